"""Files and archives as people have them: one listing, no loop, nothing lost in a tar."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ibq_scale.cli.main import main
from ibq_scale.data.adopt import adopt_tars
from ibq_scale.data.listing import list_files
from ibq_scale.data.prepare import prepare_images
from ibq_scale.data.store import open_store
from ibq_scale.data.verify import verify
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.evaluate.images import open_images
from tests.data.wild import jpeg, labels_of, photo, put, samples_of, saved, tar


def _names(to: Path) -> list[str]:
    return [name for name, _, _ in samples_of(to)]


def test_loops_of_links_end_and_no_picture_is_taken_twice(tmp_path: Path) -> None:
    put(tmp_path / "in", "a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg")
    put(tmp_path / "else", "0.jpg")
    (tmp_path / "in/a/self").symlink_to(tmp_path / "in/a")
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/b/other").symlink_to("../a")
    (tmp_path / "in/c").symlink_to(tmp_path / "else")
    (tmp_path / "in/dangling").symlink_to("nowhere")
    report = prepare_images(tmp_path / "in", str(tmp_path / "to"))
    # Class folders are often links.
    assert _names(tmp_path / "to") == ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg", "c/0.jpg"]
    assert report.seen.left_out["links to folders that are read already"].count == 3


@pytest.mark.parametrize(
    "folder", ["new [2024]", "a{b}c", "what?", "a*b", "x[0]/y{1,2}", "#1 100%", "ünïcode 猫", "a'b\"c"]
)
def test_names_that_exist_are_no_patterns(tmp_path: Path, folder: str) -> None:
    put(tmp_path / folder, "in/a/0.jpg", "in/b/0 [1].jpg")
    assert prepare_images(tmp_path / folder / "in", str(tmp_path / "to" / folder)).samples == 2
    assert labels_of(tmp_path / "to" / folder) == {"a": 1, "b": 1}
    tar(tmp_path / folder / "t [1].tar", [("0.jpg", jpeg())])
    assert list(list_files(f"{tmp_path / folder}/t [1].tar").files) == ["t [1].tar"]
    assert list(list_files(f"{tmp_path / folder}/*.tar").files) == ["t [1].tar"]
    assert open_images(str(tmp_path / folder / "in"), None).count == 2


def test_the_home_folder_is_meant_where_no_shell_has_seen_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in", "a/0.jpg")
    assert main(["prepare", "images", "~/in", "--to", "~/to"]) == 0
    assert (tmp_path / "to/manifest.json").is_file()
    assert not (tmp_path / "~").exists()
    assert open_images("~/in", None).count == 1
    with pytest.raises(UserError, match="no home folder is known"):
        list_files("~nobody-of-that-name/in")


def test_what_systems_leave_behind_is_counted_nowhere(tmp_path: Path) -> None:
    left = [".DS_Store.png", "._0.png", ".thumbnails/0.png", "@eaDir/0.png", "__MACOSX/0.png", "Thumbs.db"]
    put(tmp_path / "in", "0.png", "1.PNG", data=saved(photo(), "PNG"))
    put(tmp_path / "in", *left, data=saved(photo(1), "PNG"))
    images = open_images(str(tmp_path / "in"), None)
    (part,) = images.batches(World(0, 1, 0, torch.device("cpu")), 4)
    assert (images.count, int(part.weights_B.sum())) == (2, 2)
    report = prepare_images(tmp_path / "in", str(tmp_path / "to"))
    assert (report.samples, report.rejected) == (2, 0)
    assert sum(group.count for group in report.seen.left_out.values()) == len(left)


def test_markers_of_folders_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the console of S3 makes them: an object of no bytes whose name ends with a slash."""
    from ibq_scale.data import listing

    put(tmp_path / "in", "a/0.jpg", "b/0.jpg")
    monkeypatch.setattr(listing, "walk", lambda root: ({"a/": 0, "a/0.jpg": 9, "b/": 0, "b/0.jpg": 9, "c/": 0}, []))
    found = list_files(str(tmp_path / "in"))
    assert list(found.files) == ["a/0.jpg", "b/0.jpg"]
    assert found.left_out["markers of folders"].count == 3


def _linked(kind: bytes, target: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for name, content in (("first/0.jpg", jpeg(0)), ("first/0.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("second/1.jpg")
        info.type, info.linkname = kind, target
        t.addfile(info)
        info = tarfile.TarInfo("second/1.cls")
        info.size = 1
        t.addfile(info, io.BytesIO(b"1"))
    return out.getvalue()


@pytest.mark.parametrize(("kind", "target"), [(tarfile.LNKTYPE, "first/0.jpg"), (tarfile.SYMTYPE, "../first/0.jpg")])
def test_members_that_are_links_have_the_bytes_of_what_they_link_to(tmp_path: Path, kind: bytes, target: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(_linked(kind, target))
    for shard_bytes in (1 << 20, 100):
        report = prepare_images(tmp_path / "in", str(tmp_path / f"to-{shard_bytes}"), shard_bytes=shard_bytes)
        assert (report.samples, report.rejected) == (2, 0)
        assert [data for _, _, data in samples_of(tmp_path / f"to-{shard_bytes}")] == [jpeg(0), jpeg(0)]
    adopt_tars(str(tmp_path / "in"))
    assert labels_of(tmp_path / "in") == {"0": 1, "1": 1}
    assert verify(str(tmp_path / "in")).faults == ()


def test_a_link_to_nothing_costs_its_own_sample(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(_linked(tarfile.LNKTYPE, "absent.jpg"))
    report = prepare_images(tmp_path / "in", str(tmp_path / "to"))
    assert (report.samples, report.rejected) == (1, 1)


def _joined(*names: str, between: bytes = b"") -> bytes:
    parts = []
    for number, name in enumerate(names):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as t:
            for ending, content in (("jpg", jpeg(number)), ("cls", str(number).encode())):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
        parts.append(out.getvalue())
    return between.join(parts)


@pytest.mark.parametrize("names", [("a", "b", "c"), ("same", "same")])
def test_tars_joined_by_cat_are_read_to_the_end(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(_joined(*names))
    for shard_bytes in (1 << 20, 100):
        report = prepare_images(tmp_path / "in", str(tmp_path / f"to-{shard_bytes}"), shard_bytes=shard_bytes)
        assert (report.samples, report.rejected) == (len(names), 0)
        assert labels_of(tmp_path / f"to-{shard_bytes}") == {str(i): 1 for i in range(len(names))}
    if len(set(names)) == len(names):
        assert adopt_tars(str(tmp_path / "in")).samples == len(names)
        return
    with pytest.raises(UserError, match="the key 'same' occurs twice"):
        adopt_tars(str(tmp_path / "in"))


def test_what_follows_a_tar_and_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(_joined("a") + b"not a tar" * 100)
    report = prepare_images(tmp_path / "in", str(tmp_path / "to"))
    assert (report.samples, report.rejected) == (1, 1)
    assert "with what is no tar" in (tmp_path / "to/rejects.jsonl").read_text()


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_told_to_be_unpacked_whatever_they_are_called(tmp_path: Path, mode: str) -> None:
    tar(tmp_path / f"one/a.tar.{mode}", [("0.jpg", jpeg())], f"w:{mode}")
    with pytest.raises(UserError, match="unpack compressed archives"):
        prepare_images(tmp_path / "one", str(tmp_path / "to"))
    with pytest.raises(UserError, match="unpack compressed archives"):
        prepare_images(tmp_path / f"one/a.tar.{mode}", str(tmp_path / "to"))
    tar(tmp_path / "two/a.tar", [("0.jpg", jpeg())], f"w:{mode}")
    with pytest.raises(UserError, match=r"compressed by .*: unpack it"):
        prepare_images(tmp_path / "two", str(tmp_path / "to"))


@pytest.mark.parametrize(
    ("members", "kept"),
    [
        (["0.JPG", "1.Jpeg"], 2),
        (["./0.jpg", "./1.jpg"], 2),
        (["._0.jpg", "0.jpg"], 1),
        ([".hidden/0.jpg", "0.jpg"], 1),
        (["0.jpg", "1.bmp", "2.tif", "3.gif"], 4),
        (["a/0.jpg", "b/0.jpg"], 2),
        (["0", "1.jpg"], 1),
    ],
)
def test_names_of_members(tmp_path: Path, members: list[str], kept: int) -> None:
    forms = {"bmp": "BMP", "tif": "TIFF", "gif": "GIF"}
    items = [(name, saved(photo(i), forms.get(name.rpartition(".")[2], "JPEG"))) for i, name in enumerate(members)]
    tar(tmp_path / "in/a.tar", items)
    report = prepare_images(tmp_path / "in", str(tmp_path / "to"))
    assert (report.samples, report.rejected) == (kept, 0)


def test_upper_case_endings_of_tars_count(tmp_path: Path) -> None:
    tar(tmp_path / "in/a.TAR", [("0.jpg", jpeg()), ("0.cls", b"0")])
    assert prepare_images(tmp_path / "in", str(tmp_path / "to")).samples == 1


def test_names_that_are_no_text_end_nothing(tmp_path: Path) -> None:
    tar(tmp_path / "in/a.tar", [(b"\xff\xfe.jpg".decode("utf-8", "surrogateescape"), jpeg()), ("0.jpg", jpeg(1))])
    for report in (prepare_images(tmp_path / "in", str(tmp_path / "to")), adopt_tars(str(tmp_path / "in"))):
        assert (report.samples, report.rejected) == (1, 1)
        assert "its name is no UTF-8" in report.seen.left_out
    folder = tmp_path / "folder/a"
    folder.mkdir(parents=True)
    put(folder, b"\xff.jpg".decode("utf-8", "surrogateescape"), *(f"{i}.jpg" for i in range(9)))
    report = prepare_images(tmp_path / "folder", str(tmp_path / "to-2"))
    assert report.samples == 9
    assert report.seen.left_out["names that are no UTF-8"].first == (r"a/\udcff.jpg",)
    put(folder, b"\xfe.jpg".decode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"no UTF-8: 2 .*rename them"):
        list_files(str(tmp_path / "folder"))


@pytest.mark.slow
def test_markers_of_folders_in_s3_are_no_pictures(new_prefix: Callable[[], str], tmp_path: Path) -> None:
    url = new_prefix()
    store = open_store(url)
    for name in ("", "cat/", "dog/", "elk/", "cat/deep/"):
        store.write(name or "/", b"")
    for name in ("cat/0.jpg", "cat/deep/1.jpg", "dog/0.jpg"):
        store.write(name, jpeg())
    prepare_images(url, str(tmp_path / "to"))
    assert labels_of(tmp_path / "to") == {"cat": 2, "dog": 1}
