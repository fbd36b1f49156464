"""Dashboards beside a run's own files: W&B, TensorBoard, others by name. A failing dashboard never ends a run."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ibq_scale import extensions
from ibq_scale.config.layers import flatten
from ibq_scale.config.run import AnyRun
from ibq_scale.console import tell
from ibq_scale.documents import json_object
from ibq_scale.errors import UserError

EVENTS = "tensorboard"
# MLflow's most parameters in a call.
PARAMETERS = 100

log = logging.getLogger(__name__)


class Histogram(NamedTuple):
    """`counts[i]` values lie in [`edges[i]`, `edges[i + 1]`)."""

    counts: Sequence[int]
    edges: Sequence[int]


class Dashboard:
    """Receives a run's metrics on rank 0. A method may raise any error: the run goes on without that line.

    These methods show nothing, and a class overrides what it shows. One from outside need not be a subclass.
    """

    def values(self, step: int, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl. W&B and TensorBoard show its numbers."""

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        """The distribution of a window's values."""

    def picture(self, step: int, name: str, picture_CHW: Tensor) -> None:
        """uint8 (3, H, W)."""

    def alarm(self, step: int, text: str) -> None:
        """An alarm for a person."""

    def close(self) -> None:
        """The end of the process."""


class Dashboards:
    """All dashboards of a config. The first failure of each is logged, and again after it has worked."""

    def __init__(self, run_dir: Path, config: AnyRun) -> None:
        """UserError where one from outside cannot be imported. One that cannot start is reported and left out."""
        self._failing: set[str] = set()
        kinds = dashboard_classes(config)
        if config.tensorboard:
            kinds["TensorBoard"] = TensorBoard
        if config.wandb.mode != "off":
            kinds["W&B"] = WandB
        if config.metrics.port is not None or config.metrics.textfile is not None:
            kinds["OpenMetrics"] = lambda *run: import_module("ibq_scale.supervise.openmetrics").OpenMetrics(*run)
        self._open: dict[str, Dashboard] = {}
        for name, kind in kinds.items():
            try:
                self._open[name] = kind(run_dir, config)
            except UserError as e:
                tell(f"going on without a dashboard: {e}")
            except Exception as e:  # a run trains without a dashboard too
                log.warning("a dashboard could not start, going on without it: %s", e)

    def send(self, method: str, *values: object) -> None:
        """Calls this method of each `Dashboard`."""
        for name, dashboard in self._open.items():
            try:
                getattr(dashboard, method)(*values)
                self._failing.discard(name)
            except Exception as e:  # of any type
                if name not in self._failing:
                    log.warning("%s refused a line, going on without it: %s", name, e)
                self._failing.add(name)


def dashboard_classes(config: AnyRun) -> dict[str, Callable[[Path, AnyRun], Dashboard]]:
    """The dashboards that a config names, by name. UserError where one from outside cannot be imported."""
    return {name: TRACKERS.get(name) or extensions.load(extensions.DASHBOARDS, name) for name in config.dashboards}


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line without its texts and histograms."""
    return {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}


class WandB(Dashboard):
    """A W&B run, under the same id after each resume. Without a network it is offline, for a later `wandb sync`."""

    def __init__(self, run_dir: Path, config: AnyRun) -> None:
        import wandb

        self._module: Any = wandb
        id_file = run_dir / "wandb_id"
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        environment = json_object(run_dir / "environment.json")
        settings: dict[str, Any] = {
            "mode": config.wandb.mode,
            "project": config.wandb.project,
            "entity": config.wandb.entity,
            "group": config.wandb.group,
            "name": config.name,
            "id": id_file.read_text(encoding="utf-8").strip(),
            "resume": "allow",
            "dir": str(run_dir),
            "config": config.model_dump(mode="json") | ({"environment": environment} if environment else {}),
        }
        try:
            self._run: Any = wandb.init(**settings)
        except Exception as e:
            if config.wandb.mode == "offline":
                raise
            self._run = wandb.init(**settings | {"mode": "offline"})
            tell(f"W&B is out of reach ({e}): writing to {run_dir}/wandb; 'wandb sync' sends it later")

    def values(self, step: int, line: Mapping[str, Any]) -> None:
        self._run.log(numbers(line), step=step)

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        shown = self._module.Histogram(np_histogram=(list(histogram.counts), list(histogram.edges)))
        self._run.log({name: shown}, step=step)

    def picture(self, step: int, name: str, picture_CHW: Tensor) -> None:
        self._run.log({name: self._module.Image(picture_CHW.permute(1, 2, 0).numpy())}, step=step)

    def alarm(self, step: int, text: str) -> None:
        self._run.alert(title=f"step {step}", text=text, level="WARN")

    def close(self) -> None:
        self._run.finish()


class TensorBoard(Dashboard):
    """Event files. UserError without the package."""

    def __init__(self, run_dir: Path, config: AnyRun) -> None:
        module = _module("torch.utils.tensorboard", "tensorboard=true", "TensorBoard")
        # A resumed run writes the steps after its checkpoint again: the last ones count.
        self._writer: Any = module.SummaryWriter(str(run_dir / EVENTS))

    def values(self, step: int, line: Mapping[str, Any]) -> None:
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        middles = [(a + b) / 2 for a, b in pairwise(histogram.edges)]
        self._writer.add_histogram(name, np.repeat(middles, histogram.counts), step, bins=list(histogram.edges))

    def picture(self, step: int, name: str, picture_CHW: Tensor) -> None:
        self._writer.add_image(name, picture_CHW, step)

    def alarm(self, step: int, text: str) -> None:
        self._writer.add_text("alarms", text, step)

    def close(self) -> None:
        self._writer.close()


class MLflow(Dashboard):
    """A run of MLflow, the same one after each resume. Without MLFLOW_TRACKING_URI it is kept in the run directory."""

    def __init__(self, run_dir: Path, config: AnyRun) -> None:
        mlflow = _module("mlflow", "dashboards=[mlflow]", "MLflow")
        self._metric, own = mlflow.entities.Metric, (run_dir / "mlflow").absolute()
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
        params = [mlflow.entities.Param(key, str(value)) for key, value in values.items()]
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


class Trackio(WandB):
    """A run of trackio, which has W&B's calls. A resumed run goes on under its name."""

    def __init__(self, run_dir: Path, config: AnyRun) -> None:
        self._module = _module("trackio", "dashboards=[trackio]", "trackio")
        self._run = self._module.init(
            project="ibq-scale",
            name=config.name,
            resume="allow",
            config=flatten(config.model_dump(mode="json")),
            embed=False,
        )

    def values(self, step: int, line: Mapping[str, Any]) -> None:
        # trackio has a `time` of its own.
        super().values(step, {name: value for name, value in line.items() if name != "time"})

    def alarm(self, step: int, text: str) -> None:
        self._run.alert(title=f"step {step}", text=text)


def _module(path: str, option: str, title: str) -> Any:
    try:
        return import_module(path)
    except ModuleNotFoundError:
        raise UserError(f"{option} needs {title}: pip install 'ibq-scale[{title.lower()}]'") from None


TRACKERS = {"mlflow": MLflow, "trackio": Trackio}
