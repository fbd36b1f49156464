"""Checkpoints in two places: a bare node goes on from the other, and trouble there is no trouble here."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from ibq_scale.checkpoint.files import TensorFile, TextFile
from ibq_scale.checkpoint.mirror import Mirror, shares
from ibq_scale.checkpoint.reading import MANIFEST, verify, whole_checkpoints
from ibq_scale.checkpoint.retention import Retention
from ibq_scale.checkpoint.saving import CheckpointFolder
from ibq_scale.data import store as store_module
from ibq_scale.data.store import open_store
from ibq_scale.distributed.world import World
from ibq_scale.errors import StoreUnavailableError, UserError
from tests.faults import Exchange, FaultProxy, slow_down
from tests.ranks import run_ranks


def _folder(rank: int, size: int, folder: Path, mirror: str, keep: Retention) -> CheckpointFolder:
    return CheckpointFolder(folder, World(rank, size, rank, torch.device("cpu")), keep, Mirror(mirror))


def _save(rank: int, size: int, folder: Path, mirror: str, keep: Retention, steps: tuple[int, ...]) -> bool:
    """Saves these steps, each in the mirror before the next; the metric ``l1`` is the step."""
    with closing(_folder(rank, size, folder, mirror, keep)) as checkpoints:
        for step in steps:
            tensors = {"x": torch.full((1000,), 10.0 * step + rank)}
            files = [TensorFile(f"part/rank-{rank}.safetensors", tensors), TextFile(f"rank-{rank}.txt", str(step))]
            checkpoints.save({"step": step, "metrics": {"l1": float(step)}}, files)
            saved = checkpoints.finish()
            checkpoints.finish_mirror()
            checkpoints._uploader = None
        return saved


def _send(rank: int, size: int, folder: Path, mirror: str, keep: Retention) -> None:
    """As a start does."""
    with closing(_folder(rank, size, folder, mirror, keep)) as checkpoints:
        checkpoints.start_mirror()
        checkpoints.finish_mirror()


def _newest(rank: int, size: int, folder: Path, mirror: str) -> int:
    found = _folder(rank, size, folder, mirror, Retention(1)).newest()
    assert found is None or verify(found) == []
    return 0 if found is None else found.step


def _steps(mirror: str) -> list[int]:
    found = Mirror(mirror)
    return [copy.step for copy in found.whole(found.copies())]


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "mirror") if request.param == "local" else request.getfixturevalue("new_prefix")()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "UPLOAD_PART", 5 << 20)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_bare_node_goes_on_from_the_mirror(tmp_path: Path, new_prefix: Callable[[], str]) -> None:
    """Written by two ranks, fetched by three; a copy without its manifest does not count."""
    url, here = new_prefix(), tmp_path / "checkpoints"
    assert run_ranks(_save, 2, here, url, Retention(1), (1, 2)) == [True, True]
    assert sorted(path.name for path in here.iterdir()) == ["latest", "step-00000002"]
    assert _steps(url) == [2]
    open_store(url).write("step-00000009/part/rank-0.safetensors", b"half a copy")
    shutil.rmtree(here)
    assert run_ranks(_newest, 3, here, url) == [2, 2, 2]
    assert (here / "latest").read_text() == "step-00000002\n"
    assert (here / "step-00000002" / "rank-1.txt").read_text() == "2"


@pytest.mark.distributed
@pytest.mark.slow
def test_what_two_ranks_wrote_three_send_and_one_fetches(tmp_path: Path, url: str) -> None:
    """The store was away, so nothing was sent; the start after it is on other ranks."""
    here = tmp_path / "checkpoints"
    (tmp_path / "away").write_text("a file, no folder")
    assert run_ranks(_save, 2, here, str(tmp_path / "away"), Retention(2), (1, 2, 3)) == [True, True]
    run_ranks(_send, 3, here, url, Retention(2))
    assert _steps(url) == [2, 3]
    shutil.rmtree(here)
    assert run_ranks(_newest, 1, here, url) == [3]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_mirror_that_refuses_is_told_and_costs_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mirror").write_text("a file, no folder")
    here = tmp_path / "checkpoints"
    assert run_ranks(_save, 2, here, str(tmp_path / "mirror"), Retention(1), (1, 2)) == [True, True]
    assert [c.step for c in whole_checkpoints(here)] == [2]
    assert "step-00000002 COULD NOT BE COPIED THERE" in capfd.readouterr().err


def test_nothing_anywhere_is_a_new_run(alone: World, tmp_path: Path) -> None:
    assert _newest(0, 1, tmp_path / "checkpoints", str(tmp_path / "mirror")) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep", "left"),
    [(Retention(1), [5]), (Retention(2, every=2), [2, 4, 5]), (Retention(1, best="l1"), [1, 5])],
)
def test_the_mirror_keeps_what_is_kept_here(
    alone: World, tmp_path: Path, url: str, keep: Retention, left: list[int]
) -> None:
    _save(0, 1, tmp_path / "checkpoints", url, keep, (1, 2, 3, 4, 5))
    assert [c.step for c in whole_checkpoints(tmp_path / "checkpoints")] == left
    assert _steps(url) == left
    assert {path.split("/")[0] for path in open_store(url).files()} == {f"step-{step:08d}" for step in left}


@pytest.mark.slow
def test_only_what_was_never_a_copy_of_this_run_goes_besides(alone: World, tmp_path: Path, url: str) -> None:
    store, here = open_store(url), tmp_path / "checkpoints"
    stays = ["notes.txt", "step-3/manifest.json", "older/step-00000001/x", "step-00000009/part"]
    strange = "step-00000002/manifest.json"
    for path in [*stays, "step-00000001/part/rank-0.safetensors"]:
        store.write(path, b"x")
    store.write(strange, json.dumps({"format_version": 99}).encode())
    _save(0, 1, here, url, Retention(1), (3, 4))
    names = {path for path in store.files() if not path.startswith("step-00000004/")}
    assert names == {*stays, strange}


@pytest.mark.slow
def test_a_copy_loses_its_manifest_first(
    alone: World, tmp_path: Path, new_prefix: Callable[[], str], proxy: FaultProxy
) -> None:
    url, here = new_prefix(), tmp_path / "checkpoints"
    _save(0, 1, here, url, Retention(1), (1, 2))
    gone = [line.split("/")[-1] for line in proxy.log if line.startswith("DELETE")]
    assert sorted(gone) == ["manifest.json", "rank-0.safetensors", "rank-0.txt"]
    assert gone[0] == "manifest.json"


@pytest.mark.slow
def test_the_same_step_saved_anew_is_sent_anew_and_no_copy_in_between(
    alone: World, tmp_path: Path, new_prefix: Callable[[], str], proxy: FaultProxy
) -> None:
    url, here = new_prefix(), tmp_path / "checkpoints"
    _save(0, 1, here, url, Retention(1), (1,))
    checkpoint = whole_checkpoints(here)[0]
    (checkpoint.path / "rank-0.txt").write_text("another text")
    manifest = checkpoint.manifest
    shutil.rmtree(here)
    proxy.clear()
    with closing(_folder(0, 1, here, url, Retention(1))) as checkpoints:
        checkpoints.save({"step": 1, "metrics": manifest["metrics"]}, [TextFile("rank-0.txt", "another text")])
        assert checkpoints.finish()
        checkpoints.finish_mirror()
    writes = [line.split("/")[-1] for line in proxy.log if line.startswith(("PUT", "DELETE"))]
    assert [line.split("?")[0] for line in writes][:3] == ["manifest.json", "rank-0.txt", "manifest.json"]
    shutil.rmtree(here)
    assert _newest(0, 1, here, url) == 1
    assert (here / "step-00000001/rank-0.txt").read_text() == "another text"


@pytest.mark.slow
def test_a_store_that_was_away_is_caught_up_with_newest_first(
    alone: World,
    tmp_path: Path,
    new_prefix: Callable[[], str],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    url, here = new_prefix(), tmp_path / "checkpoints"
    proxy.down = True
    with monkeypatch.context() as patience:
        patience.setattr(store_module, "DEADLINE_SECONDS", 0.2)
        _save(0, 1, here, url, Retention(2), (1, 2, 3))
    assert "CHECKPOINTS ARE NOT COPIED THERE FOR NOW" in capfd.readouterr().err
    proxy.down = False
    assert _steps(url) == []
    proxy.clear()
    _save(0, 1, here, url, Retention(2), (4,))
    assert _steps(url) == [3, 4]
    sealed = [line for line in proxy.log if line.startswith("PUT") and MANIFEST in line]
    assert [re.findall(r"step-(\d+)", line)[0] for line in sealed] == ["00000004", "00000003"]
    sent = len(proxy.log)
    _send(0, 1, here, url, Retention(2))
    assert not [line for line in proxy.log[sent:] if line.startswith("PUT")]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_sent_at_the_next_start(
    alone: World, tmp_path: Path, url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "checkpoints"
    (tmp_path / "away").write_text("a file, no folder")
    _save(0, 1, here, str(tmp_path / "away"), Retention(2), (1, 2))
    (here / "step-00000002/rank-0.txt").write_text("3")
    _send(0, 1, here, url, Retention(2))
    assert "step-00000002 COULD NOT BE COPIED THERE (it is damaged here: rank-0.txt" in capfd.readouterr().err
    assert _steps(url) == [1]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Nothing is sent to a mirror until this is called."""
    from threading import Event

    let, put = Event(), Mirror.put

    def wait(self: Mirror, checkpoint: Path, names: list[str]) -> None:
        assert let.wait(300)
        put(self, checkpoint, names)

    monkeypatch.setattr(Mirror, "put", wait)
    yield let.set
    let.set()


@pytest.mark.slow
def test_a_slow_mirror_holds_up_no_save_and_leaves_out_what_it_cannot_keep_up_with(
    alone: World, tmp_path: Path, url: str, held: Callable[[], None]
) -> None:
    here = tmp_path / "checkpoints"
    with closing(_folder(0, 1, here, url, Retention(1))) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save({"step": step}, [TextFile("file", str(step))])
            assert checkpoints.finish()
            while step == 1 and checkpoints._uploader is not None and checkpoints._uploader._uploading is None:
                pass
        # The one being sent stays, whatever retention says.
        assert [c.step for c in whole_checkpoints(here)] == [1, 4]
        held()
        checkpoints.finish_mirror()
        assert [c.step for c in whole_checkpoints(here)] == [4]
    assert _steps(url) == [4]


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_after_a_kill_in_the_middle_no_part_is_sent_twice(
    alone: World, tmp_path: Path, new_prefix: Callable[[], str], proxy: FaultProxy
) -> None:
    """kill -9 of the process that uploads, while parts are under way; the next start sends the others."""
    url, here = new_prefix(), tmp_path / "checkpoints"
    (tmp_path / "away").write_text("a file, no folder")
    with closing(_folder(0, 1, here, str(tmp_path / "away"), Retention(1))) as checkpoints:
        checkpoints.save({"step": 1}, [TensorFile("large", {"x": torch.rand(43 << 18)})])
        assert checkpoints.finish()
    stored: list[int] = []
    child = subprocess.Popen([sys.executable, "-c", _PUT, url, str(here / "step-00000001")])

    def kill(exchange: Exchange) -> None:
        if exchange.status == 200:
            stored.append(int(re.findall(r"partNumber=(\d+)", exchange.query)[0]))
        if len(stored) == 3:
            child.kill()

    proxy.inject(kill, "large", method="PUT")
    assert child.wait(300) == -signal.SIGKILL
    while proxy.under_way:
        time.sleep(0.1)
    proxy.clear()
    assert _steps(url) == []
    assert 3 <= len(stored) < 9
    _send(0, 1, here, url, Retention(1))
    assert _steps(url) == [1]
    numbers = [int(number) for line in proxy.log for number in re.findall(r"^PUT.*partNumber=(\d+)", line)]
    assert sorted([*stored, *numbers]) == list(range(1, 10))
    shutil.rmtree(here)
    assert _newest(0, 1, here, url) == 1


# Holds few connections open: so some parts are there, and some are not, when it dies.
_PUT = """
import sys
from pathlib import Path
from ibq_scale.checkpoint.mirror import Mirror
from ibq_scale.data import multipart, store
store.UPLOAD_PART, multipart.CONNECTIONS = 5 << 20, 2
Mirror(sys.argv[1]).put(Path(sys.argv[2]), ["large"])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_uploads_that_nobody_goes_on_with_are_aborted(
    alone: World, tmp_path: Path, new_prefix: Callable[[], str], proxy: FaultProxy
) -> None:
    url, here = new_prefix(), tmp_path / "checkpoints"
    store = open_store(url)
    (tmp_path / "file").write_bytes(bytes(6 << 20))
    proxy.inject(lambda exchange: exchange.refuse(501, "Killed"), method="PUT")
    for path in ("step-00000001/old", "step-00000009/newer", "others/file"):
        with pytest.raises(UserError, match="Killed"):
            store.upload_resumable(tmp_path / "file", path)
    proxy.clear()
    _save(0, 1, here, url, Retention(1), (2,))
    assert [upload.path for upload in store.unfinished()] == ["others/file"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["changed", "missing", "manifest"])
def test_a_damaged_newest_copy_falls_back_to_the_one_before(
    alone: World, tmp_path: Path, url: str, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    here, store = tmp_path / "checkpoints", open_store(url)
    _save(0, 1, here, url, Retention(2), (1, 2))
    if damage == "missing":
        store.delete(["step-00000002/rank-0.txt"])
    else:
        store.write("step-00000002/" + ("rank-0.txt" if damage == "changed" else MANIFEST), b"3")
    shutil.rmtree(here)
    assert _newest(0, 1, here, url) == 1
    assert f"{url}/step-00000002 is damaged and left out" in capfd.readouterr().err


@pytest.mark.slow
def test_copies_that_are_all_damaged_begin_no_new_run(alone: World, tmp_path: Path, url: str) -> None:
    here = tmp_path / "checkpoints"
    _save(0, 1, here, url, Retention(1), (1,))
    open_store(url).write("step-00000001/rank-0.txt", b"3")
    shutil.rmtree(here)
    with pytest.raises(UserError, match="every copy there is damaged"):
        _newest(0, 1, here, url)


@pytest.mark.slow
def test_a_store_that_is_away_is_not_taken_for_damage(
    alone: World, tmp_path: Path, new_prefix: Callable[[], str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, here = new_prefix(), tmp_path / "checkpoints"
    _save(0, 1, here, url, Retention(2), (1, 2))
    shutil.rmtree(here)
    monkeypatch.setattr(store_module, "DEADLINE_SECONDS", 0.3)
    proxy.inject(slow_down, r"step-00000002/rank-0\.txt")
    with pytest.raises(
        StoreUnavailableError, match=r"step-00000002 could not be fetched: .*failed \d+ times? in \d+ s"
    ):
        _newest(0, 1, here, url)
    # What came before that is not brought again.
    proxy.clear()
    assert _newest(0, 1, here, url) == 2
    assert [line for line in proxy.log if "rank-0.safetensors" in line] == []


def test_files_are_dealt_out_evenly() -> None:
    files = {name: {"bytes": size} for name, size in zip("abcdef", (10, 1, 9, 1, 8, 1), strict=True)}
    dealt = shares(files, 3)
    assert sorted(name for part in dealt for name in part) == list("abcdef")
    assert sorted(sum(files[name]["bytes"] for name in part) for part in dealt) == [10, 10, 10]
    assert shares({}, 2) == [[], []]
