"""The sbatch files on a real Slurm of several nodes: jobs come back by themselves, as if undisturbed."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from ibq_scale.data.prepare import prepare_images
from ibq_scale.supervise.attempts import read_attempts
from tests import nursery
from tests.chaos.disk import difference
from tests.faults import fault_proxy
from tests.samples import SMALL_AR, write_codes
from tests.services.conftest import BUCKET, lead_to
from tests.services.slurm import Cluster, skip_without, slurm
from tests.train.runs import SMALL, lines

pytestmark = [pytest.mark.slow, pytest.mark.services]
FILES = Path(__file__).resolve().parents[2] / "slurm"
STEPS = 12
NODES = 6
PATIENCE = 300.0
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
# What stands for `ibq-scale` in the jobs. Files beside a run's directory hold it, fail a rank, or a node; one
# beside the folder of images holds a task after each batch, and the last task meets a broken node first.
PROGRAM = """#!{python}
import os, sys, time
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
run = next((word[4:] for word in sys.argv if word.startswith("out=")), None)
if run and Path(run + ".fault").exists() and os.environ.get("SLURM_NODEID") == "1":
    if "SLURM_RESTART_COUNT" not in os.environ:
        import shutil
        shutil.disk_usage = lambda _: SimpleNamespace(free=0)
if run and Path(run + ".absent").exists():
    if os.environ.get("SLURM_NODEID") == "1" and "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(600)
    from ibq_scale.distributed import rendezvous
    rendezvous.RENDEZVOUS_SECONDS = 8.0
if run and Path(run + ".impatient").exists():
    from ibq_scale.data import store
    store.DEADLINE_SECONDS = 6.0
# These GPUs are there in name only.
os.environ.pop("SLURM_GPUS_ON_NODE", None)
to = sys.argv[sys.argv.index("--to") + 1] if "--to" in sys.argv else ""
if "sample" in sys.argv and "2/3" in sys.argv and "SLURM_RESTART_COUNT" not in os.environ:
    sys.exit(71)
if "sample" in sys.argv and "1/3" in sys.argv:
    from ibq_scale.generate.chunks import Chunks
    def write(self, number, images, real=Chunks.write):
        real(self, number, images)
        while Path(to + ".held").exists():
            time.sleep(0.05)
    Chunks.write = write
if run:
    from ibq_scale.supervise.preemption import StopRequest
    # Asked twice before the first step, and after each.
    asked = 0
    def held(self, world, real):
        global asked
        if Path(run + ".broken").exists() and world.rank == 1:
            raise RuntimeError("broken")
        mark = Path(run + ".held")
        while mark.exists() and asked == int(mark.read_text()) + 1 and self._deadline == float("inf"):
            Path(run + ".waits-" + os.environ.get("SLURM_RESTART_COUNT", "0")).touch()
            time.sleep(0.05)
        asked += 1
        return real(self, world)
    StopRequest.agreed = partialmethod(held, real=StopRequest.agreed)
    StopRequest.agreed_before = partialmethod(held, real=StopRequest.agreed_before)
from ibq_scale.cli.main import main
# Data workers import this file too.
if __name__ == "__main__":
    sys.exit(main())
"""
AR = (
    *SMALL_AR,
    "ema_decay=0.9",
    "data.lanes=3",
    "train.global_batch=18",
    "train.micro_batch=3",
    "train.log_every=1",
)
# Two engines, the codebook sharded over all ranks, ZeRO-2, dropout, accumulation on 3 ranks.
TOKENIZER = (*SMALL[:-3], "train.global_batch=12", "train.micro_batch=2", "train.log_every=1")
TOKENIZER += (
    "quantizer.codebook_size=48",
    "deepspeed.config=zero2",
    "model.dropout=0.1",
    "data.lanes=3",
    "data.workers=1",
)


def _words(stage: str, run: Path, data: str, *more: str) -> list[str]:
    """Of ``train STAGE``."""
    common = ("train.checkpoint_every=2", f"data.train={data}", f"out={run}", f"train.steps={STEPS}")
    return ["tiny", *(TOKENIZER if stage == "tokenizer" else AR), *common, *more]


@dataclass
class Jobs:
    """Submits the project's own files to a cluster."""

    cluster: Cluster
    folder: Path

    def train(self, stage: str, run: Path, data: str, nodes: int, *more: str, options: tuple[str, ...] = ()) -> str:
        """Submits a run of `STEPS` steps, a rank a node; the job's number."""
        return self.submit(f"train_{stage}", f"--nodes={nodes}", *options, words=_words(stage, run, data, *more))

    def submit(self, name: str, *options: str, words: list[str]) -> str:
        """Submits one of the files as a person does, with the sizes of this cluster."""
        sizes = ("--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1", "--chdir", str(self.folder))
        file = str(FILES / f"{name}.sbatch")
        return self.cluster.command("sbatch", "--parsable", *sizes, *options, file, *words).strip()

    def until(self, job: str, condition: Callable[[], bool]) -> None:
        """Waits until `condition` holds; fails where the job ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            record = self._hurried(job)
            assert record["JobState"] not in ENDED or condition(), self.log(job)
            assert time.monotonic() < deadline, f"{record}\n{self.log(job)}"

    def end(self, job: str) -> dict[str, str]:
        """Slurm's record of the job when it has ended for good."""
        deadline = time.monotonic() + PATIENCE
        while (record := self._hurried(job))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"{record}\n{self.log(job)}"
        return record

    def _hurried(self, job: str) -> dict[str, str]:
        """The job's record, and no two minutes of pause for one that was requeued."""
        record = self.cluster.job(job)
        time.sleep(0.2)
        if record["Reason"] == "BeginTime":
            # The pause has its reason: what Slurm starts in the second in which it ended it, it takes for ended.
            time.sleep(2.0)
            self.cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now")
        return record

    def log(self, job: str) -> str:
        """All that the job wrote, in this attempt and those before."""
        found = [*self.folder.glob(f"**/*-{job}.log"), *self.folder.glob(f"**/*-{job}_*.log")]
        return "".join(path.read_text() for path in found)

    def again(self, job: str) -> Callable[[], bool]:
        """A condition: the job has been requeued once more."""
        before = int(self.cluster.job(job)["Restarts"])
        return lambda: int(self.cluster.job(job)["Restarts"]) > before


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """A cluster, and where its jobs run."""
    skip_without()
    folder = tmp_path_factory.mktemp("jobs")
    program = folder / "ibq-scale"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    root = str(FILES.parent)
    with pytest.MonkeyPatch.context() as patch, slurm(tmp_path_factory.mktemp("slurm") / "s", NODES) as cluster:
        patch.setenv("IBQ_SCALE", str(program))
        patch.setenv("PYTHONPATH", root, prepend=os.pathsep)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield Jobs(cluster, folder)


@pytest.fixture(scope="module")
def codes(jobs: Jobs) -> str:
    write_codes(jobs.folder / "codes")
    return str(jobs.folder / "codes")


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs, dataset: str, codes: str) -> dict[str, Path]:
    """Runs without Slurm that go to their end in one go, by stage and ranks."""
    runs = {}
    for stage, ranks, data in (("tokenizer", 2, dataset), ("tokenizer", 3, dataset), ("ar", 2, codes)):
        run = runs[f"{stage}-{ranks}"] = jobs.folder / f"undisturbed-{stage}-{ranks}"
        for process in nursery.commands(["train", stage, *_words(stage, run, data)], ranks):
            assert process.wait() == 0, process.said()
    return runs


@pytest.fixture
def run(jobs: Jobs, numbers: Iterator[int]) -> Path:
    """A run directory of this test's own."""
    return jobs.folder / f"run-{next(numbers)}"


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return count()


def _held(run: Path, steps: int) -> Path:
    """A run whose every attempt waits for a signal after so many steps, as long as this file is there."""
    path = run.with_name(f"{run.name}.held")
    path.write_text(str(steps))
    return path


def _waits(run: Path, restarts: int = 0) -> bool:
    """Whether a held run has come to where it waits, in the attempt after so many restarts."""
    return run.with_name(f"{run.name}.waits-{restarts}").exists()


def test_a_signalled_job_comes_back_and_a_second_one_on_its_run_is_refused(
    jobs: Jobs, undisturbed: dict[str, Path], dataset: str, run: Path
) -> None:
    held = _held(run, 3)
    job = jobs.train("tokenizer", run, dataset, 2)
    jobs.until(job, lambda: _waits(run))
    second = jobs.train("tokenizer", run, dataset, 2)
    refused = jobs.end(second)
    assert "another job trains" in jobs.log(second)
    assert (refused["JobState"], refused["ExitCode"], refused["Restarts"]) == ("FAILED", "2:0", "0")
    requeued = jobs.again(job)
    jobs.cluster.command("scancel", "--signal=USR1", job)
    jobs.until(job, requeued)
    held.unlink()
    assert jobs.end(job)["JobState"] == "COMPLETED", jobs.log(job)
    first, last = (attempt for attempt in read_attempts(run) if attempt["job"] == job)
    assert (first["code"], first["again"], last["code"], last["again"]) == (75, True, 0, False)
    assert 0 < first["step_after"] == last["step_before"] < STEPS
    assert difference(undisturbed["tokenizer-2"], run) == []


def test_a_node_that_loses_its_power_costs_the_steps_since_the_last_save(
    jobs: Jobs, undisturbed: dict[str, Path], server: dict[str, str], pictures: Path, run: Path
) -> None:
    """Three nodes, and the data in the real S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        lead_to(patch, server)
        url = f"s3://{BUCKET}/slurm"
        prepare_images(pictures, url, shard_bytes=8_000)
        held = _held(run, 3)
        job = jobs.train("tokenizer", run, url, 3, f"data.cache_dir={run}.cache")
    jobs.until(job, lambda: _waits(run) and (run / "checkpoints/latest").exists())
    requeued = jobs.again(job)
    names = jobs.cluster.command("scontrol", "show", "hostnames", jobs.cluster.job(job)["NodeList"]).split()
    jobs.cluster.kill_node(names[1])
    jobs.until(job, requeued)
    held.unlink()
    assert jobs.end(job)["JobState"] == "COMPLETED", jobs.log(job)
    jobs.cluster.start_node(names[1])
    assert "resuming from" in jobs.log(job)
    first, last = read_attempts(run)
    assert (first["code"], first["restart"], first["step_after"]) == (None, 0, last["step_before"])
    assert "by itself (a node failed" in first["why"]
    assert difference(undisturbed["tokenizer-3"], run) == []


@pytest.mark.parametrize("minutes", [0, pytest.param(5, marks=pytest.mark.long)])
def test_a_store_that_is_away_for_longer_than_the_deadline_costs_one_requeue(
    jobs: Jobs, undisturbed: dict[str, Path], server: dict[str, str], pictures: Path, run: Path, minutes: int
) -> None:
    """With Slurm's own pause of two minutes and the deadline of two, or in short."""
    with pytest.MonkeyPatch.context() as patch, fault_proxy(server["AWS_ENDPOINT_URL"]) as proxy:
        lead_to(patch, server | {"AWS_ENDPOINT_URL": proxy.url})
        url = f"s3://{BUCKET}/away-{minutes}"
        prepare_images(pictures, url, shard_bytes=8_000)
        if not minutes:
            run.with_name(f"{run.name}.impatient").touch()
        held = _held(run, 3)
        job = jobs.train("tokenizer", run, url, 2, "data.cache_dir=null", "data.workers=0")
        jobs.until(job, lambda: _waits(run))
        proxy.inject(lambda exchange: exchange.refuse(503, "SlowDown"))
        gone = time.monotonic()
        held.unlink()
        if minutes:
            while time.monotonic() < gone + 60 * minutes:
                assert jobs.cluster.job(job)["JobState"] not in ENDED, jobs.log(job)
                time.sleep(1.0)
        else:
            jobs.until(job, jobs.again(job))
        proxy.clear()
        assert jobs.end(job)["JobState"] == "COMPLETED", jobs.log(job)
    first, last = read_attempts(run)
    assert (first["code"], first["again"], last["code"]) == (69, True, 0), jobs.log(job)
    assert "the object storage did not answer" in jobs.log(job)
    assert difference(undisturbed["tokenizer-2"], run) == []


def test_requeued_at_its_time_limit_and_preempted_it_is_one_run(
    jobs: Jobs, undisturbed: dict[str, Path], codes: str, run: Path
) -> None:
    held = _held(run, 2)
    job = jobs.train("ar", run, codes, 2)
    for number, harm in enumerate(("requeue", "time limit", "preemption")):
        jobs.until(job, lambda number=number: _waits(run, number))  # type: ignore[misc]
        requeued = jobs.again(job)
        if harm == "requeue":
            jobs.cluster.command("scontrol", "requeue", job)
        elif harm == "time limit":
            jobs.cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        else:
            nodes = jobs.cluster.job(job)["NodeList"]
            words = ("--partition=urgent", "--nodes=2", "--exclusive", f"--nodelist={nodes}", "--output=/dev/null")
            jobs.cluster.command("sbatch", *words, "--wrap", "true")
        jobs.until(job, requeued)
        # While its last part is still ending, Slurm takes it for one that has finished.
        jobs.until(job, lambda: jobs.cluster.job(job)["JobState"] in ("PENDING", "RUNNING"))
        jobs.cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    held.unlink()
    assert jobs.end(job)["JobState"] == "COMPLETED", jobs.log(job)
    # Of the first, nobody could ask.
    assert [attempt["code"] for attempt in read_attempts(run)] == [None, 75, 75, 0]
    assert jobs.log(job).count("by a signal, saved") == 3
    assert difference(undisturbed["ar-2"], run) == []


def test_a_run_of_three_nodes_goes_on_with_two(jobs: Jobs, undisturbed: dict[str, Path], codes: str, run: Path) -> None:
    held = _held(run, 3)
    job = jobs.train("ar", run, codes, 3)
    jobs.until(job, lambda: _waits(run))
    # As `ibq-scale cancel` does: what saves now does not come back.
    jobs.cluster.command("scontrol", "update", f"JobId={job}", "Requeue=0")
    jobs.cluster.command("scancel", "--signal=USR1", job)
    assert jobs.end(job)["ExitCode"] == "75:0", jobs.log(job)
    assert "the job ends: it was stopped by a signal" in jobs.log(job)
    assert "goes back" not in jobs.log(job)
    held.unlink()
    job = jobs.train("ar", run, codes, 2)
    assert jobs.end(job)["JobState"] == "COMPLETED", jobs.log(job)
    assert "resuming from" in jobs.log(job)
    # Sums over other ranks round differently, and the difference grows with the steps: the first eight are compared.
    losses = [[line["loss"] for line in lines(path)[:8]] for path in (run, undisturbed["ar-2"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(("how", "code"), [("misspelt", 2), ("broken", 1)])
def test_what_fails_at_once_does_not_come_back(jobs: Jobs, codes: str, run: Path, how: str, code: int) -> None:
    if how == "broken":
        run.with_name(f"{run.name}.broken").touch()
    job = jobs.train("ar", run, codes, 2, *(["model.dept=3"] if how == "misspelt" else []))
    record = jobs.end(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", f"{code}:0", "0")
    said = jobs.log(job)
    assert "the job ends: it" in said
    if how == "broken":
        told = re.findall(r"ibq-scale: rank (\d) of 2 on \S+ failed first: RuntimeError: broken", said)
        assert told == ["1"], said
        assert said.index("failed first") < said.index("the job ends")
    else:
        assert said.count("did you mean 'model.depth'?") == 1, said
    assert not [*(run / "logs").glob("failures-*")]


def test_a_cancelled_job_saves_and_stays_away(jobs: Jobs, codes: str, run: Path) -> None:
    _held(run, 1)
    job = jobs.train("ar", run, codes, 1)
    jobs.until(job, lambda: _waits(run))
    jobs.cluster.command("scancel", job)
    assert jobs.end(job)["JobState"] == "CANCELLED"
    deadline = time.monotonic() + PATIENCE
    while "by a signal, saved" not in jobs.log(job):
        assert time.monotonic() < deadline, jobs.log(job)
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("fault", "rank 1 on {node} failed its start-up check: "),
        ("absent", "rank 1 on {node} failed its start-up check: did not come within 8 s"),
    ],
)
def test_a_node_that_fails_its_check_is_named_and_left_out(
    jobs: Jobs, codes: str, run: Path, harm: str, said: str
) -> None:
    run.with_name(f"{run.name}.{harm}").touch()
    job = jobs.train("ar", run, codes, 2, options=("--exclude=node5",))
    jobs.until(job, jobs.again(job))
    attempt = read_attempts(run)[0]
    names = jobs.cluster.command("scontrol", "show", "hostnames", attempt["nodes"]).split()
    assert (attempt["code"], attempt["excluded"]) == (71, [names[1]])
    assert said.format(node=names[1]) in jobs.log(job)
    assert f"goes back into the queue, without {names[1]}: a node failed its check" in jobs.log(job)
    record = jobs.end(job)
    assert record["JobState"] == "COMPLETED", jobs.log(job)
    excluded = set(jobs.cluster.command("scontrol", "show", "hostnames", record["ExcNodeList"]).split())
    assert excluded == {names[1], "node5"}
    ran_on = jobs.cluster.command("scontrol", "show", "hostnames", record["NodeList"]).split()
    assert not excluded & set(ran_on)


def test_an_array_of_which_one_is_killed_and_rerun_writes_the_same_bytes(
    jobs: Jobs, undisturbed: dict[str, Path], dataset: str
) -> None:
    tokenizer, whole, parts = str(undisturbed["tokenizer-2"]), jobs.folder / "whole", jobs.folder / "parts"
    _direct("tokenize", tokenizer, dataset, "--to", str(whole))
    array = jobs.submit("tokenize", "--array=0-3", words=[tokenizer, dataset, "--to", str(parts)])
    victim = f"{array}_2"
    jobs.until(victim, lambda: jobs.cluster.job(victim)["JobState"] == "RUNNING")
    jobs.cluster.command("scancel", "--signal=KILL", victim)
    tasks = [f"{array}_{task}" for task in range(4)]
    assert [jobs.end(task)["JobState"] for task in tasks] == [*["COMPLETED"] * 2, "CANCELLED", "COMPLETED"]
    assert not (parts / "manifest.json").exists()
    jobs.cluster.command("scontrol", "requeue", victim)
    assert jobs.end(victim)["JobState"] == "COMPLETED", jobs.log(victim)
    names = sorted(path.name for path in whole.iterdir())
    assert len(json.loads((whole / "manifest.json").read_text())["shards"]) >= 4
    assert names == sorted(path.name for path in parts.iterdir())
    assert [name for name in names if (whole / name).read_bytes() != (parts / name).read_bytes()] == []


def test_a_sample_array_of_which_one_is_killed_and_rerun_writes_the_bytes_of_one_process(
    jobs: Jobs, tokenizer_dir: Path, ar_dir: Path
) -> None:
    words = [str(ar_dir), "--tokenizer", str(tokenizer_dir), "--per-class", "4", "--batch", "2", "--guidance", "2"]
    parts, whole = jobs.folder / "images", jobs.folder / "images-whole"
    held = parts.with_name("images.held")
    held.touch()
    array = jobs.submit("sample", "--array=0-2", "--output=%x-%A_%a.log", words=[*words, "--to", str(parts)])
    victim = f"{array}_1"
    jobs.until(victim, lambda: (parts / ".parts/000001.npz").exists())
    jobs.cluster.command("scancel", "--signal=KILL", victim)
    tasks = [f"{array}_{task}" for task in range(3)]
    assert [jobs.end(task)["JobState"] for task in tasks] == ["COMPLETED", "CANCELLED", "COMPLETED"], jobs.log(array)
    # The last one's number is the whole array's too, and yet it alone left its node.
    records = [jobs.cluster.job(task) for task in tasks]
    assert [record["Restarts"] for record in records] == ["0", "0", "1"]
    assert records[2]["ExcNodeList"] not in ("(null)", records[2]["NodeList"])
    assert not (parts / "samples.npz").exists()
    held.unlink()
    jobs.cluster.command("scontrol", "requeue", victim)
    assert jobs.end(victim)["JobState"] == "COMPLETED", jobs.log(victim)
    assert "(2 from an earlier run)" in jobs.log(victim)
    _direct("sample", *words, "--to", str(whole))
    for name in ("samples.npz", "grid.png"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in parts.iterdir()) == ["grid.png", "samples.json", "samples.npz"]


def test_evaluate_on_two_nodes_finds_what_one_process_does(jobs: Jobs, tokenizer_dir: Path, dataset: str) -> None:
    words = ["reconstruction", str(tokenizer_dir), dataset, "--batch", "5", "--json"]
    job = jobs.submit("evaluate", "--nodes=2", words=words)
    assert jobs.end(job)["JobState"] == "COMPLETED", jobs.log(job)
    (line,) = [line for line in jobs.log(job).splitlines() if line.startswith("{")]
    found, alone = (json.loads(text) for text in (line, _direct("evaluate", *words)))
    for report in (found, alone):
        assert report.pop("seconds") > 0
        assert report.pop("images_per_s") > 0
    assert found == alone
    assert found["images"] == 24


def test_ranks_of_other_commands_say_once_what_is_wrong(jobs: Jobs, dataset: str) -> None:
    job = jobs.submit("evaluate", "--nodes=2", words=["reconstruction", str(jobs.folder / "nothing"), dataset])
    assert jobs.end(job)["ExitCode"] == "2:0", jobs.log(job)
    (said,) = [line for line in jobs.log(job).splitlines() if line.startswith("ibq-scale: ")]
    assert "nothing" in said
    assert not list(jobs.folder.glob(".failures-*"))


def _direct(*words: str) -> str:
    """One process, without Slurm; what it printed."""
    done = nursery.run([*words, "--ranks", "1"])
    assert done.returncode == 0, done.stderr
    return done.stdout
