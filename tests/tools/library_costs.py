"""What a quantizer costs, beside vector-quantize-pytorch's: ``python -m tests.tools.library_costs [BITS …]``.

One Markdown row a quantizer and a pair of cells a codebook of 2^BITS codes: CPU seconds of a training step (forward and
backward) on one thread, the median of turns in one process, and the peak memory of a step above that of the inputs and
the module, in a process of its own. The other package is left out where it is not installed. It need not be in this
environment: ``pip install --no-deps --target FOLDER vector-quantize-pytorch einx einops frozendict loguru
torch-einops-utils``, then ``PYTHONPATH=FOLDER``.
"""

from __future__ import annotations

import os
import pickle
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ibq_scale import FSQ, IBQ, LFQ, VQ, SimVQ

TOKENS, DIM = 1024, 64
TURNS = 3


def _ours(bits: int) -> dict[str, Callable[[], nn.Module]]:
    return {
        "`IBQ`": lambda: IBQ(DIM, 2**bits),
        "`VQ`": lambda: VQ(DIM, 2**bits),
        "`SimVQ`": lambda: SimVQ(DIM, 2**bits),
        "`LFQ`": lambda: LFQ(bits),
        "`FSQ`": lambda: FSQ(levels=[4] * (bits // 2)),
    }


def _others(bits: int) -> dict[str, Callable[[], nn.Module]]:
    if find_spec("vector_quantize_pytorch") is None:
        return {}
    import vector_quantize_pytorch as other

    learned = {"learnable_codebook": True, "ema_update": False}
    return {
        "theirs: VectorQuantize (EMA)": lambda: other.VectorQuantize(DIM, 2**bits, rotation_trick=False),
        "theirs: VectorQuantize (learned)": lambda: other.VectorQuantize(DIM, 2**bits, rotation_trick=False, **learned),
        "theirs: VectorQuantize (rotation trick)": lambda: other.VectorQuantize(DIM, 2**bits, rotation_trick=True),
        "theirs: SimVQ": lambda: other.SimVQ(DIM, 2**bits),
        "theirs: LFQ": lambda: other.LFQ(dim=bits, codebook_size=2**bits),
        "theirs: FSQ": lambda: other.FSQ(levels=[4] * (bits // 2)),
    }


def forms(bits: int) -> dict[str, Callable[[], nn.Module]]:
    """The quantizers of 2^bits codes by their names in the table."""
    return _ours(bits) | _others(bits)


def _width(name: str, bits: int) -> int:
    return bits if "LFQ" in name else bits // 2 if "FSQ" in name else DIM


def step_of(name: str, bits: int) -> Callable[[], None]:
    """A training step of tokens (1, N, D) with their gradient."""
    torch.manual_seed(0)
    module = forms(bits)[name]().train()
    z = torch.randn(1, TOKENS, _width(name, bits)).requires_grad_()
    upstream = torch.randn_like(z)

    def step() -> None:
        z.grad = None
        module.zero_grad()
        out = module(z)
        quantized, *rest = (out.quantized, out.loss) if hasattr(out, "loss") else out
        losses = [x.sum() for x in rest if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.backward((quantized * upstream).sum() + sum(losses))

    return step


def seconds(bits: int) -> dict[str, float]:
    """CPU seconds of a step of each, by turns."""
    steps = {name: step_of(name, bits) for name in forms(bits)}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS + 1 if bits < 17 else TURNS):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if turn:
                found[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in found.items()}


def peak(name: str, bits: int) -> float:
    """MiB of a first step above what module and inputs hold."""
    step = step_of(name, bits)
    before = _resident()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def _resident() -> float:
    # The second number of statm, in pages.
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """The result from a forked process: the peak of one step must not hide the next."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            made = pickle.dumps(function(*args))
        except (RuntimeError, MemoryError) as e:
            made = pickle.dumps(e)
        with os.fdopen(writing, "wb") as out:
            out.write(made)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as source:
        made = source.read()
    os.waitpid(child, 0)
    return pickle.loads(made) if made else None


def main(bits: list[int]) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    rows: dict[str, list[str]] = {}
    for number in bits:
        times = apart(seconds, number)
        for name in forms(number):
            memory = apart(peak, name, number)
            took = times.get(name) if isinstance(times, dict) else None
            cell = f"{1000 * took:.3g} ms" if took is not None else "failed"
            rows.setdefault(name, []).append(f"{cell}, {memory:.0f} MiB" if isinstance(memory, float) else cell)
        print(f"2^{number} done", file=sys.stderr, flush=True)
    print("| | " + " | ".join(f"2^{number}" for number in bits) + " |")
    print("|---" * (len(bits) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [10, 12, 14, 16, 18])
