"""What a step asks of GPUs: waits of the host, collectives, copies between host and device, kernels, memory layouts."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibq_scale.scaling.allocations import Allocations, rounded
from tests.rehearsal import gpu

PACKAGES = ("ibq_scale", "deepspeed")
# Of DeepSpeed, around what others of it call.
WRAPPERS = ("comm/", "utils/nvtx.py", "accelerator/")
KINDS = {"allreduce": "all-reduce", "allgather": "all-gather", "_allgather": "all-gather", "alltoall": "all-to-all"}
KINDS |= {"reduce_scatter": "reduce-scatter", "_reduce_scatter": "reduce-scatter", "reduce": "reduce"}
KINDS |= {"broadcast": "broadcast"}
READS = ("aten._local_scalar_dense.default", "aten.item.default")
LAID_OUT = ("aten.convolution.default", "aten.native_group_norm.default")


class Call(NamedTuple):
    """Something that a function of the package or of DeepSpeed asked for; `size` in bytes of whole tensors."""

    kind: str
    place: str
    size: int = 0

    @property
    def ours(self) -> bool:
        return not self.place.startswith("deepspeed/")

    @property
    def sent(self) -> int:
        """Bytes that each of many ranks sends, by rings: the tensor, twice in an all-reduce."""
        return self.size * (2 if self.kind == "all-reduce" else 1)


class Watch(TorchDispatchMode):
    """Notes what passes below autograd. Fake tensors have no values: what the host reads is answered.

    The quantizer's operator runs with all its collectives, where fake tensors would run what tells shapes only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[Call] = []
        """Waits of the host for the device: reads of values, blocking copies either way, synchronize()."""
        self.collectives: list[Call] = []
        self.launches: Counter[str] = Counter()
        self.layouts: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, everything is noted."""
        from ibq_scale.models import fused_norm
        from ibq_scale.quantize import backend, tiles, triton_backend

        known = {module: dict(vars(module)) for module in (backend, triton_backend, fused_norm, dist)}
        vars(backend)["_obstacle"] = lambda *_: None
        vars(triton_backend)["launch"] = self._launch
        vars(fused_norm)["launch"] = self._launch_norm
        vars(triton_backend)["chosen"] = lambda kernel, precision, dim, *_: tiles.offered(kernel, dim)[0]
        vars(dist)["all_gather_object"] = self._gather_objects
        vars(dist)["broadcast_object_list"] = lambda *_, **__: self._send_objects()
        gpu.on_wait.append(lambda: self._wait("synchronize"))
        try:
            with self:
                yield
        finally:
            gpu.on_wait.clear()
            for module, names in known.items():
                vars(module).update(names)

    def _wait(self, kind: str) -> None:
        self.syncs.append(Call(kind, place()))
        if gpu.capturing:
            self.faults.append(f"{kind} while a graph is captured, in {place()}")

    def _send_objects(self) -> None:
        """NCCL sends their size and their bytes. The host waits for both."""
        self.collectives += [Call("objects", place())] * 2
        self._wait("objects")

    def _gather_objects(self, out: list[Any], mine: Any, group: Any = None) -> None:
        self._send_objects()
        out[:] = [mine] * len(out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if func.namespace == "ibq_scale":
            from ibq_scale.models import fused_norm
            from ibq_scale.quantize import function, vq

            bodies = {
                "ibq_forward": function._forward,
                "ibq_backward": function._backward,
                "group_norm_forward": fused_norm._forward,
                "group_norm_backward": fused_norm._backward,
                "nearest_rows": vq._nearest_rows,
            }
            with self:
                out = bodies[func._opname](*args, **kwargs)
            return out if isinstance(out, Tensor) else tuple(out)
        if name.startswith("aten.to."):
            # Not taken apart below autograd, and copies of constants would ask the driver.
            with self:
                return func.decompose(*args, **kwargs)
        if name in READS:
            return self._read(args[0])
        if name == "aten.nonzero.default":
            # The host waits for the number of places: none are found.
            self._wait("nonzero")
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        if name == "aten.index.Tensor" and (mask := args[1][0]) is not None and mask.dtype == torch.bool:
            return self._chosen(args[0], mask)
        if name.startswith("c10d."):
            self._send(func._opname, args)
        elif name in ("aten._to_copy.default", "aten.copy_.default"):
            self._copy(name, args, kwargs)
        elif name in LAID_OUT:
            self.layouts[func._opname, order(args[0])] += 1
        with gpu.devices(0):
            out = func(*args, **kwargs)
        if name == "aten.convolution.default" and order(args[0]) == "NHWC":
            # cuDNN keeps the order also in bf16, where fake tensors are told of another backend.
            return out.contiguous(memory_format=torch.channels_last)
        return out

    def _chosen(self, rows: Tensor, mask: Tensor) -> Tensor:
        """All of them. On a GPU the host waits for their number."""
        if mask.is_cuda:
            self._wait("nonzero")
        return rows.new_empty((mask.numel(), *rows.shape[mask.dim() :]))

    def _read(self, value: Tensor) -> Any:
        """A norm of 1, finite, of which nothing overflowed; no end of the run."""
        if value.is_cuda:
            self._wait("read")
        if value.dtype == torch.bool:
            return place().startswith("ibq_scale/")
        if "preemption" in place():
            return math.inf
        return 1.0 if value.is_floating_point() else 0

    def _copy(self, name: str, args: Any, kwargs: Any) -> None:
        source = args[0] if name.startswith("aten._to") else args[1]
        target = torch.device(kwargs.get("device") or source.device) if name.startswith("aten._to") else args[0].device
        blocks = not (kwargs.get("non_blocking") or (name.startswith("aten.copy") and len(args) > 2 and args[2]))
        if source.device.type != target.type and (blocks or gpu.capturing):
            self._wait(f"copy {source.device.type} to {target.type}")

    def _send(self, name: str, args: Any) -> None:
        kind = next((kind for begin, kind in KINDS.items() if name.removesuffix("_").split("_base")[0] == begin), None)
        if kind is None:
            return
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        sums = [sum(t.numel() * t.element_size() for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args]
        self.collectives.append(Call(kind, place(), max(sums)))
        self.faults += [f"{kind} of a tensor on {t.device}, in {place()}" for t in tensors if not t.is_cuda]

    def _launch(self, kernel: str, tile: Any, grid: tuple[int, ...], dim: int, precision: Any, *arguments: Any) -> None:
        from ibq_scale.quantize import compiled, tiles

        fixed = tiles.constants(kernel, tile, dim, precision)
        names = [name for name in tiles.function(kernel).arg_names if name not in fixed]
        self._check(kernel, grid, {name: compiled._type(kernel, name, precision) for name in names}, arguments)

    def _launch_norm(
        self, kernel: str, grid: tuple[int, ...], channels: int, groups: int, silu: bool, *arguments: Any
    ) -> None:
        from ibq_scale.models import fused_norm

        fixed = fused_norm.constants(kernel, channels, groups, silu=silu)
        names = [name for name in fused_norm.function(kernel).arg_names if name not in fixed]
        narrow = any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in arguments)
        self._check(
            kernel, grid, {name: fused_norm.kind(name, "bf16" if narrow else "fp32") for name in names}, arguments
        )

    def _check(self, kernel: str, grid: tuple[int, ...], kinds: dict[str, str], arguments: Sequence[Any]) -> None:
        self.launches[kernel] += 1
        if len(kinds) != len(arguments) or not all(blocks > 0 for blocks in grid):
            self.faults.append(f"kernel {kernel}: {len(arguments)} arguments for {list(kinds)}, grid {grid}")
        for (name, kind), value in zip(kinds.items(), arguments, strict=False):
            if isinstance(value, Tensor):
                wanted = {"*i32": torch.int32, "*bf16": torch.bfloat16, "*fp32": torch.float32}
                # Kernels take images (B, C, H, W) in channels-last order.
                dense = order(value) in ("NHWC", "either") if value.dim() == 4 else value.is_contiguous()
                if not value.is_cuda or not dense or value.dtype != wanted[kind]:
                    told = f"{value.dtype} on {value.device}, strides {value.stride()}"
                    self.faults.append(f"kernel {kernel}, {name}: {told}; it takes {kind}, contiguous, on CUDA")


class Memory(Allocations):
    """Bytes of tensors on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                storage = leaf.untyped_storage()
                self._follow(storage, rounded(storage.nbytes()))
        return out


def order(x: Tensor) -> str:
    """How a tensor (B, C, H, W) lies in memory."""
    first, last = x.is_contiguous(), x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return {(True, False): "NCHW", (False, True): "NHWC", (True, True): "either"}.get((first, last), "neither")


def place() -> str:
    """The innermost function of the package or of DeepSpeed that is running: ``ibq_scale/train/codebook.py step``."""
    frame = sys._getframe(1)
    while frame is not None:
        for package in PACKAGES:
            _, found, path = frame.f_code.co_filename.rpartition(f"/{package}/")
            if found and not path.startswith(WRAPPERS):
                return f"{package}/{path} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
