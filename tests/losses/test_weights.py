"""The folder of pretrained weights: what is there, what is fetched or taken, what is refused."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from ibq_scale.cli.fetch_weights import NAMES
from ibq_scale.cli.main import main
from ibq_scale.errors import UserError
from ibq_scale.losses import weights
from ibq_scale.losses.weights import SOURCES, WeightFile, verified, weights_folder
from tests.web import CONTENT, SHA256, WebServer, send


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def published(web_server: WebServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, WeightFile]:
    """Stand-ins of the files, served on loopback."""
    sources = {
        name: WeightFile(f"{name}-1-{SHA256[:8]}.pth", f"the {name} net", "tests", web_server.url) for name in NAMES
    }
    monkeypatch.setattr(weights, "SOURCES", sources)
    return sources


def test_upstream_still_names_the_files_so(folder: Path) -> None:
    """The packages' own addresses end in the names that we look for, and most names in hashes."""
    assert tuple(SOURCES) == NAMES
    for name, source in SOURCES.items():
        assert source.url.startswith("https://")
        assert source.url.rpartition("/")[2] == source.file
        assert len(source.sha256_prefix) == {"dino": 0, "dinov2": 64}.get(name, 8)
        assert int(source.sha256_prefix or "1", 16) > 0


def test_a_file_without_a_published_hash_is_checked_and_its_hash_kept(
    web_server: WebServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(path: Path) -> None:
        if path.read_bytes() != CONTENT:
            raise UserError("another network's tensors")

    source = WeightFile("net.pth", "a net", "tests", web_server.url, sha256="", check=check)
    monkeypatch.setattr(weights, "SOURCES", {"dino": source})
    web_server.behave = lambda handler, _: send(handler, b"something else")
    assert main(["fetch-weights", "dino"]) == 2
    assert "another network's tensors" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    # By hand, so nothing is known of it.
    (folder / "net.pth").write_bytes(CONTENT)
    with pytest.raises(UserError, match="no recorded hash: 'ibq-scale fetch-weights dino'"):
        verified("dino")
    assert weights.status(["dino"])[0].state == "unverified"
    assert main(["fetch-weights", "dino"]) == 0
    assert (folder / "net.pth.sha256").read_text() == f"{SHA256}  net.pth\n"
    assert verified("dino") == folder / "net.pth"
    (folder / "net.pth").write_bytes(CONTENT + b"x")
    with pytest.raises(UserError, match="is damaged"):
        verified("dino")
    # A fetch now wants the recorded bytes.
    assert main(["fetch-weights", "dino"]) == 2
    assert "invalid hash value" in capsys.readouterr().err
    web_server.behave = lambda handler, _: send(handler, CONTENT)
    assert main(["fetch-weights", "dino"]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["net.pth", "net.pth.sha256"]


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IBQ_SCALE_WEIGHTS", raising=False)
    assert weights_folder() == Path.home() / ".cache/ibq-scale/weights"


def test_fetching_and_listing(
    published: dict[str, WeightFile], web_server: WebServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch-weights", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(entry["name"], entry["state"], entry["bytes"]) for entry in listed] == [(n, "missing", 0) for n in NAMES]
    assert listed[0]["path"] == str(folder / published["vgg"].file)
    assert not folder.exists()
    assert web_server.requests == 0

    assert main(["fetch-weights", "vgg"]) == 0
    assert f"vgg-1-{SHA256[:8]}.pth ← http://127.0.0.1" in capsys.readouterr().err
    (folder / published["alex"].file).write_bytes(CONTENT[:-1])
    assert main(["fetch-weights", "--list"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["vgg", "there"],
        ["alex", "damaged"],
        *([name, "missing"] for name in NAMES[2:]),
    ]

    assert main(["fetch-weights", "--json"]) == 0
    captured = capsys.readouterr()
    assert {entry["state"] for entry in json.loads(captured.out)} == {"there"}
    assert "vgg-1-" in captured.err
    assert web_server.requests == len(NAMES)
    assert sorted(p.name for p in folder.iterdir()) == sorted(source.file for source in published.values())


def test_files_that_somebody_has(
    published: dict[str, WeightFile],
    web_server: WebServer,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / published["vgg"].file).write_bytes(CONTENT)
    assert main(["fetch-weights", "vgg", "--from", str(tmp_path / "mine")]) == 0
    (tmp_path / "renamed.pth").write_bytes(CONTENT)
    assert main(["fetch-weights", "alex", "--from", str(tmp_path / "renamed.pth")]) == 0
    for name in ("vgg", "alex"):
        assert (folder / published[name].file).read_bytes() == CONTENT
    (tmp_path / "wrong.pth").write_bytes(CONTENT + b"x")
    for given, said in {
        "mine": "does not hold inception-1-",
        "wrong.pth": f"its sha256 does not begin with {SHA256[:8]}",
        "absent": "does not exist",
    }.items():
        capsys.readouterr()
        assert main(["fetch-weights", "inception", "--from", str(tmp_path / given)]) == 2
        assert said in capsys.readouterr().err
    assert web_server.requests == 0
    assert len(list(folder.iterdir())) == 2


def test_no_network_is_said_in_two_lines(
    published: dict[str, WeightFile], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        monkeypatch.setitem(published, "vgg", WeightFile(published["vgg"].file, "a net", "tests", url))
        assert main(["fetch-weights", "--json"]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "←" not in line]
    assert captured.out == ""
    assert len(lines) == 2
    assert "no internet here?" in lines[0]
    assert "--from" in lines[1]
    assert list(folder.iterdir()) == []


def test_wrong_use(
    published: dict[str, WeightFile],
    web_server: WebServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fetch-weights", "resnet"]) == 2
    assert "choose from vgg, alex, inception" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path / "file"))
    assert main(["fetch-weights", "vgg"]) == 2
    assert "set IBQ_SCALE_WEIGHTS to another folder" in capsys.readouterr().err
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path / "weights"))
    web_server.behave = lambda handler, _: send(handler, b"", 404)
    assert main(["fetch-weights", "vgg"]) == 2
    assert "404" in capsys.readouterr().err


def test_a_hash_prefix_is_that_of_the_whole_name() -> None:
    assert WeightFile("a-b-2015-12-05-6726825d.pth", "", "", "").sha256_prefix == "6726825d"


def test_training_is_refused_before_it_starts(
    folder: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "tokenizer", "tiny", f"data.train={dataset}", f"out={tmp_path / 'run'}"]
    for net, file, word in (
        ("vgg", "vgg16-397923af.pth", "loss.perceptual=vgg"),
        ("alex", "alexnet-owt-7be5be79.pth", "loss.perceptual=alex"),
        ("dino", "dino_deitsmall16_pretrain.pth", "discriminator.kind=dino"),
        ("dinov2", "dinov2_vits14_pretrain.pth", "loss.features=dinov2"),
    ):
        assert main([*words, word]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 2
        assert f"{file} is not in {folder}: run 'ibq-scale fetch-weights {net}'" in lines[0]
        assert SOURCES[net].what in lines[0]
        assert "IBQ_SCALE_WEIGHTS" in lines[1]
    assert not (tmp_path / "run").exists()
