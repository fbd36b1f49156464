"""A folder on a file system: only its own regular files are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ibq_scale.data.store import open_store
from ibq_scale.errors import UserError


def test_links_out_of_a_folder_are_not_followed_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/inside").write_text("inside")
    (tmp_path / "set/link").symlink_to("inside")
    (tmp_path / "set/shard").symlink_to("../secret")
    (tmp_path / "alias").symlink_to("set")
    for root in ("set", "alias"):
        store = open_store(str(tmp_path / root))
        assert store.read("link") == b"inside"
        for read in (store.read, lambda name, store=store: store.read_range(name, 0, 3)):
            with pytest.raises(UserError, match="it is a link out of this folder"):
                read("shard")
        with pytest.raises(UserError, match="it is a link out of this folder"):
            store.download("shard", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert open_store(str(tmp_path / "set"), links=True).read("shard") == b"secret"


def test_what_is_no_file_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    store = open_store(str(tmp_path))
    for name in ("pipe", "folder", "loop"):
        for ask in (store.read, store.size, lambda path: store.read_range(path, 0, 1)):
            with pytest.raises(UserError, match=f"cannot read .*{name}"):
                ask(name)
    with pytest.raises(FileNotFoundError):
        store.read("pipe/x")
