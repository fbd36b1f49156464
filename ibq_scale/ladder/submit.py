"""A ladder's rungs as Slurm jobs, each checked, copied and queued as by ``ibq-scale submit``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ibq_scale.cluster.checks import CHECKS, Submission, run_checks
from ibq_scale.cluster.profile import Profile
from ibq_scale.cluster.submit import make_request, next_snapshot, render, submit, training
from ibq_scale.config.layers import require_complete
from ibq_scale.findings import Finding
from ibq_scale.ladder.run import is_finished
from ibq_scale.ladder.rungs import Rung


@dataclass(frozen=True)
class Submitted:
    """The result for a rung: its jobs, or its failed checks. Neither for a finished rung."""

    rung: Rung
    finished: bool = False
    jobs: tuple[str, ...] = ()
    checks: tuple[Finding, ...] = ()
    script: str = ""

    @property
    def failed(self) -> list[Finding]:
        return [check for check in self.checks if check.level == "FAIL"]


@dataclass(frozen=True)
class Order:
    nodes: int
    profile: Profile
    cluster: str | None
    flags: dict[str, Any]
    sbatch: Sequence[str]
    chain: int
    dry_run: bool


def submit_rungs(rungs: Sequence[Rung], order: Order) -> Iterator[Submitted]:
    """The result of each rung as it comes. A rung with a failed check is left out, and the others go on.

    UserError for a rung without data, for a folder with a run of another config, or if Slurm refuses a job.
    """
    for rung in rungs:
        require_complete(rung.run)
        if is_finished(rung):
            yield Submitted(rung, finished=True)
            continue
        request = make_request(training(rung.run), order.nodes, order.profile, order.flags, list(order.sbatch))
        script = render(request, next_snapshot(request))
        assert request.work.config is not None, "it trains"
        job = Submission(script, request.work.config, request.profile.gpu, queue=not order.dry_run)
        held = Submitted(rung, checks=tuple(run_checks(job, CHECKS)), script=script.text)
        if order.dry_run or held.failed:
            yield held
            continue
        _, jobs = submit(request, chain=order.chain, cluster=order.cluster)
        yield Submitted(rung, jobs=tuple(jobs), checks=held.checks)
