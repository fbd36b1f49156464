"""Names from manifests become paths only where they stay in their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibq_scale.names import file_name, is_inside, is_sha256


@pytest.mark.parametrize("name", ["a", "a/b.tar", "step-00000001/x.safetensors", "café 1.tar", "...", "a..b", "-x"])
def test_relative_names_are_taken(name: str) -> None:
    assert file_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "/a", "a/", "a//b", "./a", "a/./b", "a/../b", "../a", "a/..", "..\\a", "a\\b", "C:a", "c:/a",
        "a\0b", "a\nb", "a\x7fb", "a" * 256, "a/" * 600 + "a", "\ud800", None, 3, ["a"], "\u202eexe",
    ],
)  # fmt: skip
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="file name"):
        file_name(name)


def test_a_link_leads_out_and_a_root_may_be_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    (tmp_path / "real/in").symlink_to("file")
    (tmp_path / "real/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real/folder").symlink_to("/")
    assert is_inside(tmp_path / "root", "file")
    assert is_inside(tmp_path / "root", "in")
    for name in ("out", "folder/etc/passwd", "../elsewhere"):
        assert not is_inside(tmp_path / "root", name)


@pytest.mark.parametrize(
    "value", ["0" * 63, "0" * 65, "A" * 64, "0" * 63 + "\n", "/etc/passwd", None, 3, "../" * 21 + "0"]
)
def test_a_hash_is_64_digits(value: object) -> None:
    assert is_sha256("0123456789abcdef" * 4)
    assert not is_sha256(value)
