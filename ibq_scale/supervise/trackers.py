"""Dashboards with a name of this package, imported only where a config names them: MLflow and trackio."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from ibq_scale.config.layers import flatten
from ibq_scale.config.run import AnyRun
from ibq_scale.errors import UserError
from ibq_scale.supervise.dashboards import QuietDashboard, numbers

# MLflow's longest value of a parameter, and most parameters in a call.
VALUE_CHARACTERS, PARAMETERS = 6000, 100


class MLflow(QuietDashboard):
    """A run of MLflow, the same one after each resume. Without MLFLOW_TRACKING_URI it is kept in the run directory."""

    def __init__(self, run_dir: Path, config: AnyRun) -> None:
        mlflow = _module("mlflow", "MLflow")
        entities = import_module("mlflow.entities")
        self._metric, own = entities.Metric, (run_dir / "mlflow").absolute()
        # Its file store takes no new runs without an environment variable (3.17).
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{own}.db")
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ibq-scale")
        experiment = self._client.get_experiment_by_name(name)
        place = None if "MLFLOW_TRACKING_URI" in os.environ else own.as_uri()
        number = experiment.experiment_id if experiment else self._client.create_experiment(name, place)
        id_file = run_dir / "mlflow_id"
        if id_file.is_file():
            self._run = id_file.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(number, run_name=config.name).info.run_id
        id_file.write_text(self._run, encoding="utf-8")
        values = flatten(config.model_dump(mode="json"))
        params = [entities.Param(key, str(value)[:VALUE_CHARACTERS]) for key, value in values.items()]
        for first in range(0, len(params), PARAMETERS):
            self._client.log_batch(self._run, params=params[first : first + PARAMETERS])

    def values(self, step: int, line: Mapping[str, Any]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, float(value), now, step) for name, value in numbers(line).items()]
        self._client.log_batch(self._run, metrics=metrics)

    def picture(self, step: int, name: str, picture_CHW: Tensor) -> None:
        self._client.log_image(self._run, picture_CHW.permute(1, 2, 0).numpy(), key=name, step=step)

    def alarm(self, step: int, text: str) -> None:
        self._client.set_tag(self._run, f"alarm at step {step}", text)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio(QuietDashboard):
    """A run of trackio, which has W&B's calls. A resumed run goes on under its name."""

    def __init__(self, run_dir: Path, config: AnyRun) -> None:
        self._module: Any = _module("trackio", "trackio")
        self._run: Any = self._module.init(
            project="ibq-scale",
            name=config.name,
            resume="allow",
            config=flatten(config.model_dump(mode="json")),
            embed=False,
        )

    def values(self, step: int, line: Mapping[str, Any]) -> None:
        # trackio has a `time` of its own.
        self._run.log({name: value for name, value in numbers(line).items() if name != "time"}, step=step)

    def picture(self, step: int, name: str, picture_CHW: Tensor) -> None:
        self._run.log({name: self._module.Image(picture_CHW.permute(1, 2, 0).numpy())}, step=step)

    def alarm(self, step: int, text: str) -> None:
        self._run.alert(title=f"step {step}", text=text)

    def close(self) -> None:
        self._run.finish()


def _module(name: str, title: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        raise UserError(f"dashboards=[{name}] needs {title}: pip install 'ibq-scale[{name}]'") from None


CLASSES = {"mlflow": MLflow, "trackio": Trackio}
