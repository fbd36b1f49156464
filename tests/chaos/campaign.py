"""Kill and restart, again and again, and compare with a run that nobody killed."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.chaos.disk import Inspector, difference, last_step, tensors_compared
from tests.chaos.moments import Watch, choose
from tests.chaos.processes import Life
from tests.chaos.scenario import Scenario

# The launcher gives ranks that lost one 20 s; data workers look for their trainer twice a second.
END_SECONDS, GONE_SECONDS = 90.0, 20.0
STEPS_A_KILL = 4
HEAD = f"{'kill':>4}  {'victim':<12} {'at':<17} {'step':>5} {'newest':>7} {'ended s':>8} {'first step s':>12}  faults"


@dataclass
class Kill:
    """One kill and what it left. `ended_s`: from the kill to the end of the command; `first_step_s`: from this life's
    start to its first step, None where it did not get there."""

    number: int
    run: int
    aim: str
    victim: str
    phase: str
    step: int
    exit_code: int
    newest: int
    resumed_from: int | None
    ended_s: float
    first_step_s: float | None
    faults: list[str]

    def row(self) -> str:
        first = "-" if self.first_step_s is None else f"{self.first_step_s:.1f}"
        return (
            f"{self.number:>4}  {self.victim:<12} {self.phase:<17} {self.step:>5} {self.newest or '-':>7} "
            f"{self.ended_s:>8.1f} {first:>12}  {'; '.join(self.faults) or 'none'}"
        )


@dataclass
class Result:
    """What came of one stage."""

    task: str
    seed: int
    ranks: int
    workers: int
    steps: int
    runs: int = 0
    tensors: int = 0
    """Compared at each run's end."""
    seconds: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    end_faults: list[str] = field(default_factory=list)
    resumed: int = 0
    """Lives that went on from a checkpoint."""

    @property
    def faults(self) -> int:
        return sum(len(kill.faults) for kill in self.kills) + len(self.end_faults)

    def summary(self) -> list[str]:
        """Lines to print."""
        counts = {name: Counter(getattr(k, name) for k in self.kills) for name in ("victim", "phase")}
        lines = [
            f"{self.task}: {len(self.kills)} kills over {self.runs} run(s) of {self.steps} steps on {self.ranks} ranks "
            f"(data workers of each: {self.workers}), seed {self.seed}, {self.seconds / 60:.1f} min"
        ]
        for name, found in counts.items():
            lines.append(f"  by {name}: " + ", ".join(f"{what} {n}" for what, n in found.most_common()))
        lines.append(f"  starts that went on from a checkpoint, each the newest whole one: {self.resumed}")
        lines.append(f"  {self.tensors} tensors of the last checkpoint compared with the unkilled run's, each run")
        lines += [f"  FAULT at the end: {fault}" for fault in self.end_faults]
        lines.append(f"  faults: {self.faults or 'none'}")
        return lines


class Campaign:
    """`kills` kills over runs of one stage, under `folder`; what happens is told to `tell` line by line."""

    def __init__(self, scenario: Scenario, folder: Path, kills: int, seed: int, tell: Callable[[str], None]) -> None:
        self.scenario = scenario
        self.folder = folder
        self.kills = kills
        self.tell = tell
        self.random = Random(f"{scenario.task} {seed}")
        self.result = Result(scenario.task, seed, scenario.ranks, scenario.workers, max(24, STEPS_A_KILL * kills))
        self._lives = 0
        self._start_s = self._step_s = 0.0

    def run(self) -> Result:
        """The reference, then killed runs until all kills have landed and the last run has ended by itself.

        Stops at the first fault, so that what stands on the disk is what somebody has to look at.
        """
        began = time.monotonic()
        self.folder.mkdir(parents=True)
        self.scenario.make_data(self.folder / "data")
        reference = self.folder / "reference"
        self._unkilled(reference)
        self.result.tensors = tensors_compared(reference)
        self.tell(HEAD)
        while not self.result.faults and len(self.result.kills) < self.kills:
            self.result.runs += 1
            run = self.folder / f"run-{self.result.runs}"
            faults = self._one_run(run) or difference(reference, run)
            self.result.end_faults += faults
            self.tell(f"      run {self.result.runs}: {'; '.join(faults) or 'ended, equal to the unkilled one'}")
        self.result.seconds = time.monotonic() - began
        return self.result

    def _unkilled(self, run: Path) -> None:
        life = self._start(run)
        watch = Watch(run, life, self.random, 0.0, 0.0)
        while not watch.stepped() and not life.ended:
            time.sleep(0.01)
        self._start_s = life.seconds
        code = life.launcher.wait()
        if code != 0:
            raise RuntimeError(f"the run that nobody killed ended with {code}:\n{life.said()}")
        self._step_s = (life.seconds - self._start_s) / self.result.steps
        self.tell(
            f"{self.scenario.task}: {self.result.steps} steps unkilled in {life.seconds:.0f} s, of which "
            f"{self._start_s:.0f} s to the first"
        )

    def _one_run(self, run: Path) -> list[str]:
        """Lives of one run directory, one after another, to its end; the faults that stand in no kill's line."""
        inspector = Inspector(run)
        life = self._start(run)
        try:
            while len(self.result.kills) < self.kills:
                kill = self._shoot(life, run, inspector)
                if kill is None:
                    break
                # At once, as a batch system might: beside processes of the life before that are about to end.
                before, life = life, self._start(run)
                kill.faults += _lingering(before)
                self.result.kills.append(kill)
                self.tell(kill.row())
                if kill.faults:
                    return [f"stopped at the first fault: see {run} and {before.log}"]
            return self._to_the_end(life, inspector)
        finally:
            life.clear()

    def _shoot(self, life: Life, run: Path, inspector: Inspector) -> Kill | None:
        """Waits for an instant, kills, and looks at what is left; None where the life ended by itself before."""
        whole = inspector.newest
        aim, kind = choose(self.random, self.scenario.workers)
        watch = Watch(run, life, self.random, self._start_s, self._step_s)
        if not watch.until(aim):
            return None
        victim = life.kill(kind, self.random)
        at = time.monotonic()
        phase, step = watch.phase(), last_step(run)
        code = _end_of(life, END_SECONDS)
        ended = time.monotonic() - at
        self.result.resumed += bool(_resumed_from(life))
        faults = [*_wrong_end(life, code, ended), *_wrong_start(life, whole), *inspector.look()]
        return Kill(
            number=len(self.result.kills) + 1,
            run=self.result.runs,
            aim=aim,
            victim=victim,
            phase=phase,
            step=step,
            exit_code=code,
            newest=inspector.newest,
            resumed_from=_resumed_from(life),
            ended_s=round(ended, 2),
            first_step_s=watch.first_step_s,
            faults=faults,
        )

    def _to_the_end(self, life: Life, inspector: Inspector) -> list[str]:
        """Lets the last life end by itself."""
        whole = inspector.newest
        code = _end_of(life, 60.0 + 10.0 * self._start_s + 5.0 * self._step_s * self.result.steps)
        wrong = [f"the run ended with {code}, see {life.log}"] if code else []
        self.result.resumed += bool(_resumed_from(life))
        return wrong + _wrong_start(life, whole) + _lingering(life) + inspector.look()

    def _start(self, run: Path) -> Life:
        self._lives += 1
        log = self.folder / f"life-{self._lives:03d}.log"
        return Life(self.scenario.command(self.folder / "data", run, self.result.steps), log)


def _end_of(life: Life, within: float) -> int:
    """Waits for the command's end, and brings it about where it does not come; the exit code."""
    deadline = time.monotonic() + within
    while not life.ended and time.monotonic() < deadline:
        time.sleep(0.01)
    if not life.ended:
        life.clear()
    return life.launcher.wait()


def _wrong_end(life: Life, code: int, seconds: float) -> list[str]:
    if seconds > END_SECONDS:
        return [f"the command lived on for {seconds:.0f} s after the kill"]
    # 2 refuses the directory, 70 has hung, 75 was asked to stop.
    return [f"exit code {code}, see {life.log}"] if code in (2, 70, 75) else []


def _wrong_start(life: Life, whole: int) -> list[str]:
    """Whether the life went on from another checkpoint than the newest whole one that it found."""
    found = _resumed_from(life)
    return [] if found in (None, whole) else [f"went on from step {found}, and step {whole} was whole"]


def _resumed_from(life: Life) -> int | None:
    """The step it says to go on from, 0 for a start; None where it has not come so far."""
    said = re.search(r": (?:resuming from \S*/step-(\d+)|starting);", life.said())
    return None if said is None else int(said[1] or 0)


def _lingering(life: Life) -> list[str]:
    """Waits for all processes of a life whose command has ended to end as well."""
    deadline = time.monotonic() + GONE_SECONDS
    while left := life.left():
        if time.monotonic() > deadline:
            life.clear()
            return [f"{len(left)} processes lived on for {GONE_SECONDS:.0f} s"]
        time.sleep(0.1)
    return []
