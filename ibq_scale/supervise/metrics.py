"""One stream of metrics to RUN/metrics.jsonl, rank 0's progress line and the config's dashboards."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ibq_scale.checkpoint.files import write_whole
from ibq_scale.config.run import AnyRun
from ibq_scale.console import duration, gigabytes, tell
from ibq_scale.documents import read_json_lines
from ibq_scale.pictures import save_png
from ibq_scale.supervise.dashboards import Dashboards, Histogram

METRICS, PICTURES = "metrics.jsonl", "images"
# The progress line leaves out shorter stalls.
SHOWN_STALL_SECONDS = 1.0

log = logging.getLogger(__name__)


class MetricsLog:
    """Rank 0's log. Lines of metrics.jsonl after `start_step` are of a lost part of the run and are removed."""

    def __init__(self, run_dir: Path, config: AnyRun, start_step: int) -> None:
        self.path = run_dir / METRICS
        self._pictures = run_dir / PICTURES
        self.total_steps = config.train.total_steps
        self.seconds_before = keep_until(self.path, start_step)
        self._started = time.monotonic()
        self._file = self.path.open("a", encoding="utf-8")
        self._dashboards = Dashboards(run_dir, config)

    def write(
        self,
        step: int,
        samples: int,
        values: Mapping[str, float],
        shown: tuple[str, ...],
        alarms: Sequence[str] = (),
        histograms: Mapping[str, Histogram] = MappingProxyType({}),
    ) -> None:
        """Appends a line, prints the progress line with the metrics in `shown`, and prints each alarm."""
        elapsed = self.seconds_before + time.monotonic() - self._started
        line: dict[str, Any] = {"step": step, "samples": samples, "time": round(elapsed, 3), **values}
        if alarms:
            line["alarms"] = list(alarms)
        if histograms:
            line["histograms"] = {name: histogram._asdict() for name, histogram in histograms.items()}
        self._append(json.dumps(line) + "\n")
        self._dashboards.send("values", step, line)
        for name, histogram in histograms.items():
            self._dashboards.send("histogram", step, name, histogram)
        tell(self._progress(step, values, shown))
        for alarm in alarms:
            log.warning("step %d: %s", step, alarm)
            tell(f"ALARM at step {step}: {alarm}")
            self._dashboards.send("alarm", step, alarm)

    def show(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Writes pictures, uint8 (3, H, W), to RUN/images and the dashboards."""
        for name, picture_CHW in pictures.items():
            path = self._pictures / f"{name}-{step:08d}.png"
            try:
                save_png(path, picture_CHW)
            except OSError as e:
                log.warning("could not write %s: %s", path, e)
            self._dashboards.send("picture", step, name, picture_CHW)

    def _append(self, text: str) -> None:
        """Text for a full disk stays in memory until the next line."""
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as e:
            log.warning("could not write to %s: %s", self.path, e)

    def _progress(self, step: int, values: Mapping[str, float], shown: tuple[str, ...]) -> str:
        width = len(str(self.total_steps))
        rate = values["samples_per_s"]
        left = (self.total_steps - step) * values["step_s"]
        parts = [f"step {step:>{width}}/{self.total_steps}"]
        parts += [f"{name} {values[name]:.4g}" for name in shown if name in values]
        parts += [f"{rate:.1f} img/s"]
        if "mfu" in values:
            parts.append(f"MFU {100 * values['mfu']:.1f} %")
        parts += [f"wait {100 * values['data_wait']:.0f} %", f"mem {gigabytes(values['memory_bytes'])}"]
        parts.append(f"ETA {duration(left)}")
        if values.get("skipped"):
            parts.append(f"skipped {values['skipped']:.0f}")
        if values.get("save_stall_s", 0.0) >= SHOWN_STALL_SECONDS:
            parts.append(f"stood still {values['save_stall_s']:.1f} s for a save")
        return "  ".join(parts)

    def close(self) -> None:
        """Flushes all to disk, if there is room."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as e:
            log.warning("the end of %s is lost: %s", self.path, e)
        self._dashboards.send("close")


def keep_until(path: Path, step: int) -> float:
    """Drops damaged lines and lines after `step`, for a resumed run to write again. Returns the time so far (s)."""
    if not path.is_file():
        return 0.0
    kept, seconds = [], 0.0
    for text, line in read_json_lines(path):
        if not isinstance(line.get("step"), int) or not isinstance(line.get("time"), (int, float)):
            continue
        if line["step"] > step:
            break
        kept.append(text)
        seconds = float(line["time"])
    write_whole(path, "".join(text + "\n" for text in kept))
    return seconds
