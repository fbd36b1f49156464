"""A pretended GPU: torch.cuda answers as with H200s present, and nothing of it reaches a driver."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor

# The environment variable with the path of the compiled driver.c, which is preloaded into the process.
DRIVER = "IBQ_SCALE_REHEARSAL_DRIVER"
DEVICES = 8
on_wait: list[Callable[[], object]] = []
"""Called where the host waits for a stream, an event or the device."""
step = 0
"""Counted by who runs steps."""
capturing = False
"""Whether the host is within `torch.cuda.graph`."""
PROPERTIES = SimpleNamespace(
    name="pretended H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 10**9
)


def build_driver(folder: Path) -> dict[str, str]:
    """Compiles driver.c; returns the environment that a process needs, from its start on, to pretend."""
    compiler = shutil.which("cc")
    assert compiler is not None
    library = folder / "driver.so"
    source = Path(__file__).with_name("driver.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source, "-ldl"], check=True
    )
    # A real GPU stays out of it.
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    return {DRIVER: str(library), "LD_PRELOAD": str(library), "DS_ACCELERATOR": "cuda"} | hidden


def _wait() -> None:
    for told in on_wait:
        told()


class _Stream:
    """A stream or an event: everything asked of it is done at once."""

    device = torch.device("cuda", 0)
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> bool:
        return False

    def synchronize(self) -> None:
        _wait()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _Event(_Stream):
    """Waiting for one of an earlier step lets the device run on: that is no wait for the device."""

    recorded = -1

    def record(self, *_: Any) -> None:
        self.recorded = step

    def synchronize(self) -> None:
        if self.recorded == step:
            _wait()


class _Graph(_Stream):
    """A captured graph, and its capture, which begins and ends with a wait. A replay does nothing."""

    def __enter__(self) -> _Graph:
        global capturing
        _wait()
        capturing = True
        return self

    def __exit__(self, *_: Any) -> bool:
        global capturing
        capturing = False
        return False


def pretend() -> None:
    """Changes torch in this process, for good."""
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    # Before 2.14 it makes a tensor where CUDA is said to be there.
    vars(fake_tensor)["init_gpu_context"] = lambda device: None
    stream = _Stream()
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": False,  # fake tensors then leave it alone
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": DEVICES,
        "current_device": 0,
        "get_device_properties": PROPERTIES,
        "get_device_capability": (9, 0),
        "get_device_name": PROPERTIES.name,
        "current_stream": stream,
        "default_stream": stream,
        "stream": stream,
    }
    nothing = ("set_device", "empty_cache", "reset_peak_memory_stats", "ipc_collect", "_lazy_init")
    counts = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    answers |= dict.fromkeys(nothing) | dict.fromkeys(counts, 0)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    vars(torch.cuda).update(Stream=_Stream, Event=_Event, CUDAGraph=_Graph, graph=_Graph)
    vars(torch.cuda)["synchronize"] = lambda *_: _wait()
    vars_of: Any = torch.Tensor
    vars_of.pin_memory = lambda self: self
    FakeTensor.numpy = lambda self: np.zeros(self.shape, str(self.dtype).removeprefix("torch."))
    FakeTensor.tolist = _list
    _move_by_replacing()
    _show_devices_in_backward()


def _list(values: torch.Tensor) -> Any:
    """By one read of one value, where fake tensors would read each."""
    read = values.flatten()[0].item() if values.numel() else 0
    return np.full(values.shape, read).tolist()


def _move_by_replacing() -> None:
    """Fake parameters cannot change their device in place: modules get new ones, before an optimizer knows them."""

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, order = torch._C._nn._parse_to(*args, **kwargs)
        return place(self, device, dtype, order)

    def to_empty(self: nn.Module, *, device: Any, recurse: bool = True) -> nn.Module:
        return place(self, device, recurse=recurse)

    vars_of: Any = nn.Module
    vars_of.to, vars_of.to_empty = to, to_empty
    vars_of.bfloat16 = lambda self: place(self, dtype=torch.bfloat16)
    vars_of.float = lambda self: place(self, dtype=torch.float32)


def place(
    module: nn.Module, device: Any = None, dtype: Any = None, order: Any = None, recurse: bool = True
) -> nn.Module:
    """The module, with parameters and buffers on this device and in this dtype and order."""

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if tensor.is_floating_point() and dtype is not None else tensor.dtype
        where = torch.device(device) if device is not None else tensor.device
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", 0)
        if (tensor.device, tensor.dtype) == (where, wanted) and (order is None or tensor.dim() != 4):
            return tensor
        if order is not None and tensor.dim() == 4:
            return torch.empty(tensor.shape, dtype=wanted, device=where, memory_format=order)
        return torch.empty(tensor.shape, dtype=wanted, device=where)

    for child in module.modules() if recurse else [module]:
        for name, parameter in list(child._parameters.items()):
            if parameter is not None and (new := placed(parameter)) is not parameter:
                child._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = placed(buffer)
    return module


def _show_devices_in_backward() -> None:
    """The engine has a queue for each device that is shown, while it runs. Operators must not see any."""
    import torch.autograd
    import torch.autograd.graph

    run = torch.autograd.graph._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with devices(DEVICES):
            return run(*args, **kwargs)

    torch.autograd.graph._engine_run_backward = torch.autograd._engine_run_backward = backward  # type: ignore[attr-defined]


_shown = 0


@contextmanager
def devices(count: int) -> Iterator[None]:
    """Within, C++ code sees so many devices."""
    global _shown
    library = ctypes.CDLL(os.environ[DRIVER])
    before, _shown = _shown, count
    library.show_devices(count)
    try:
        yield
    finally:
        _shown = before
        library.show_devices(before)
