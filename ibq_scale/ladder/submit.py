"""A ladder's rungs as Slurm jobs, each checked, copied and queued as by ``ibq-scale submit``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ibq_scale.cluster.checks import CHECKS, Submission, run_checks
from ibq_scale.cluster.submit import Request, Work, next_snapshot, render, submit, training
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

    @property
    def failed(self) -> bool:
        return any(check.level == "FAIL" for check in self.checks)


def submit_rungs(
    rungs: Sequence[Rung], request_of: Callable[[Work], Request], *, chain: int, cluster: str | None, dry_run: bool
) -> Iterator[Submitted]:
    """The result of each rung as it comes. A rung with a failed check is left out, and the others go on.

    UserError for a rung without data, for a folder with a run of another config, or if Slurm refuses a job.
    """
    for rung in rungs:
        require_complete(rung.run)
        if is_finished(rung):
            yield Submitted(rung, finished=True)
            continue
        request = request_of(training(rung.run))
        assert request.work.config is not None, "it trains"
        script = render(request, next_snapshot(request))
        job = Submission(script, request.work.config, request.profile.gpu, queue=not dry_run)
        checks = tuple(run_checks(job, CHECKS))
        jobs = [] if dry_run or job.failed else submit(request, chain=chain, cluster=cluster)[1]
        yield Submitted(rung, jobs=tuple(jobs), checks=checks)
