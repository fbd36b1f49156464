"""Files of a checkpoint: safetensors that the library reads, with the hash of what is on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ibq_scale.checkpoint import files
from ibq_scale.checkpoint.files import DTYPES, HostCopies, TensorFile, TextFile, Written


def _is_on_disk(written: Written, path: Path) -> bool:
    content = path.read_bytes()
    return written == (len(content), hashlib.sha256(content).hexdigest())


def _tensor(shape: list[int], dtype: torch.dtype, transposed: bool) -> Tensor:
    values = torch.randint(0, 2, shape) if dtype == torch.bool else torch.randint(-5, 6, shape).abs()
    return values.to(dtype).transpose(0, -1) if transposed and shape else values.to(dtype)


tensors = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.builds(_tensor, st.lists(st.integers(0, 5), max_size=3), st.sampled_from(list(DTYPES)), st.booleans()),
    max_size=6,
)


@settings(max_examples=60)
@given(tensors=tensors, metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3))
def test_the_library_reads_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    folder = tmp_path_factory.mktemp("written")
    file = TensorFile("sub/x.safetensors", tensors, metadata)
    assert _is_on_disk(file.write(folder), folder / file.path)
    found = load_file(folder / file.path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(folder / file.path, framework="pt") as f:  # type: ignore[no-untyped-call]
        assert (f.metadata() or {}) == (metadata or {})


def test_several_chunks_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 100)
    values = torch.arange(1000.0)
    assert _is_on_disk(TensorFile("x", {"x": values}).write(tmp_path), tmp_path / "x")
    assert torch.equal(load_file(tmp_path / "x")["x"], values)
    assert _is_on_disk(TextFile("y", "ä" * 300).write(tmp_path), tmp_path / "y")


def test_copies_are_of_the_moment_and_their_memory_is_used_again() -> None:
    live, copies = torch.zeros(3), HostCopies()

    def take(tensor: Tensor) -> Tensor:
        (file,) = copies.take([TensorFile("x", {"w": tensor})])
        assert isinstance(file, TensorFile)
        return file.tensors["w"]

    first = take(live)
    live += 1
    assert first.tolist() == [0, 0, 0]
    second = take(live)
    assert second.data_ptr() == first.data_ptr()
    assert second.tolist() == [1, 1, 1]
    assert take(live.double()).dtype == torch.float64
    assert take(torch.ones(5)).tolist() == [1] * 5
