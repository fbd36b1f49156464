"""One GPU's memory, item by item, at the two possible peaks: in the passes and in the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ibq_scale.config.batch import codebook_group_size
from ibq_scale.config.run import AnyRun, ARRun, TokenizerRun
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.scaling.activation_memory import ar_activation_memory, logit_bytes, tokenizer_activation_memory
from ibq_scale.scaling.networks import Network
from ibq_scale.zero.memory import FP32, States, Zero, engine_states

# A stated constant: CUDA's context with loaded kernels, cuBLAS and cuDNN workspaces, NCCL's channels.
FIXED = 2_000_000_000
# Unusable gaps of the allocator, as a share of the activations.
FRAGMENTATION = 0.05
# Tensors of all gathered tokens (M, D) in fp32 within the quantizer's step: z, its gradient, the decoder's, p C.
TOKEN_TENSORS = 4
TILE = 1 << 30
# Triton's largest block, and the places of a token's list of candidates (quantize/triton_backend.py, tiles.py).
BLOCK, NEAR = 512 << 20, 512
# Copies of a shard's rows in fp32 within Region VQ's term (means, targets, free codes, what they get, differences), and
# for codes of length 1 (rows, their gradient).
REGION_ROWS, UNIT_ROWS = 6, 2
SCRATCH = "optimizer's scratch"
CODEBOOK_STATES = 5  # rows, gradient, two moments, average


@dataclass(frozen=True)
class Line:
    """Bytes of one item: on the GPU in the passes and in the optimizer's step, and in host memory."""

    name: str
    passes: int
    step: int
    host: int = 0


@dataclass(frozen=True)
class MemoryBudget:
    """`kept_per_image`: bytes kept by an image for the backward pass. `validation`: peak bytes between steps, with a
    full copy of the averaged weights (0 without validation).
    """

    lines: tuple[Line, ...]
    kept_per_image: float
    validation: int
    notes: tuple[str, ...]

    @property
    def passes(self) -> int:
        """Peak bytes in forward and backward passes."""
        return sum(line.passes for line in self.lines)

    @property
    def step(self) -> int:
        """Peak bytes in the optimizer's step."""
        return sum(line.step for line in self.lines)

    @property
    def peak(self) -> int:
        """Peak bytes of the GPU."""
        return max(self.passes, self.step, self.validation)

    @property
    def host(self) -> int:
        """Bytes of host memory for offloading, per rank."""
        return sum(line.host for line in self.lines)


def ar_states(run: ARRun, zero: Zero, network: Network) -> list[Line]:
    """Permanent memory in the transformer's training."""
    return engine_lines("", _states(network, zero), ema_bytes(network, zero, run.ema_decay))


def ar_budget(run: ARRun, zero: Zero, network: Network) -> MemoryBudget:
    """Memory of the transformer's training."""
    states = _states(network, zero)
    memory = ar_activation_memory(run, keeps_gradients=states.keeps_gradients and zero.accumulation == 1)
    # Logits exist at the end of the forward pass. The peak may come later, with the buckets, which ZeRO-3 always keeps.
    later = memory.peak + (states.on_gpu("buckets") if zero.stage < 3 else 0)
    logits = max(0, memory.kept + logit_bytes(run) - later)
    lines = [
        *ar_states(run, zero, network),
        Line("activations", memory.peak, 0),
        Line("logits and loss", logits, 0),
    ]
    shows = run.tokenizer is not None and run.validation.images > 0
    copy = zero.weight_bytes * network.parameters if run.validation.data is not None or shows else 0
    return _budget(lines, memory.kept / run.train.micro_batch, copy, states)


def tokenizer_budget(
    run: TokenizerRun, zero: Zero, network: Network, discriminator: Network, frozen: Mapping[str, int]
) -> MemoryBudget:
    """Memory of the tokenizer's training. UserError if `codebook_group` does not divide the ranks.

    `frozen`: elements of frozen networks, by name.
    """
    states = _states(network, zero)
    memory = tokenizer_activation_memory(run, keeps_gradients=states.keeps_gradients and zero.accumulation == 1)
    size = codebook_group_size(run, zero.world)
    tokens = run.train.micro_batch * run.model.tokens * size
    kept = FP32 * TOKEN_TENSORS * tokens * run.quantizer.dim
    if run.quantizer.backend in ("tiled", "cublas"):
        block = run.quantizer.tile_bytes or TILE
    else:
        # A block of e^S, or of the gradient of S, in the dtype of the products.
        element = 2 if run.quantizer.logit_precision == "bf16" else FP32
        block = min(BLOCK, element * tokens * run.quantizer.codebook_size // size) + 2 * FP32 * NEAR * tokens
    rows = -(-run.quantizer.codebook_size // size) * run.quantizer.dim
    block += FP32 * rows * (REGION_ROWS * run.quantizer.region + UNIT_ROWS * run.quantizer.l2_normalize)
    # The networks' peak is in the decoder or the losses, where the quantizer's blocks are free.
    work = kept + max(0, memory.at_quantizer + block - memory.peak)
    lines = [
        *tokenizer_states(run, zero, network, discriminator, frozen),
        Line("activations", memory.peak, 0),
        Line("quantizer's work", work, 0),
    ]
    whole = network.parameters + run.quantizer.codebook_size * run.quantizer.dim
    copy = FP32 * whole if run.validation.data is not None else 0
    return _budget(lines, memory.kept / run.train.micro_batch, copy, states)


def tokenizer_states(
    run: TokenizerRun, zero: Zero, network: Network, discriminator: Network, frozen: Mapping[str, int]
) -> list[Line]:
    """Permanent memory in the tokenizer's training. UserError as for `tokenizer_budget`."""
    size = codebook_group_size(run, zero.world)
    rows = FP32 * -(-run.quantizer.codebook_size // size) * run.quantizer.dim
    copies = CODEBOOK_STATES if KINDS[run.quantizer.kind].learns == "rows" else 2
    return [
        *engine_lines("", _states(network, zero), ema_bytes(network, zero, run.ema_decay)),
        _joined(
            "discriminator, all states",
            engine_lines("", _states(discriminator, discriminator_zero(zero)), 0),
        ),
        Line(f"codebook, 1/{size} of {copies} copies", copies * rows, copies * rows),
        *(Line(f"{name}, frozen", n * zero.weight_bytes, n * zero.weight_bytes) for name, n in frozen.items()),
    ]


def discriminator_zero(zero: Zero) -> Zero:
    """ZeRO of the discriminator's engine, as `zero.engine.discriminator_config`."""
    return Zero(min(1, zero.stage), zero.world, zero.weight_bytes, zero.accumulation)


def ema_bytes(network: Network, zero: Zero, decay: float) -> int:
    """Bytes of this rank's part of the average."""
    return FP32 * -(-network.parameters // zero.world) if decay > 0 else 0


def engine_lines(prefix: str, states: States, ema: int) -> list[Line]:
    """An engine's items with more than 0 bytes."""
    fields = [
        ("weights", "weights", "weights"),
        ("gradients", "earlier_gradients", "gradients"),
        ("fp32 weights of the optimizer", "master", "master"),
        ("moments of Muon and Adam" if states.muon else "Adam's moments", "moments", "moments"),
        ("communication buckets", "buckets", "buckets"),
        ("ZeRO-3: whole weights in use", "gathered", ""),
        (SCRATCH, "", "step"),
    ]
    lines = []
    for name, passes, step in fields:
        on_host = sorted({f for f in (passes, step) if f and states.places.get(f) == "host"})
        host = max((getattr(states, f) for f in on_host), default=0)
        line = Line(prefix + name, states.on_gpu(passes) if passes else 0, states.on_gpu(step) if step else 0, host)
        if line.passes or line.step or line.host:
            lines.append(line)
    if ema:
        offloaded = states.places.get("master") == "host"
        lines.append(Line(prefix + "EMA", 0, 0, ema) if offloaded else Line(prefix + "EMA", ema, ema))
    return lines


def checkpoint_bytes(run: AnyRun, nets: Sequence[Network]) -> int:
    """Bytes of a checkpoint: fp32 weights and moments, averages, the codebook's rows."""
    total = sum(FP32 * (net.parameters + net.moments + net.buffers) for net in nets)
    total += FP32 * nets[0].parameters * (run.ema_decay > 0)
    if isinstance(run, TokenizerRun):
        rows = FP32 * run.quantizer.codebook_size * run.quantizer.dim
        # rows, average, two moments and the exported rows (a frozen codebook has no moments)
        total += rows * (CODEBOOK_STATES if KINDS[run.quantizer.kind].learns == "rows" else 3)
        # The window: an int64 a code.
        total += 8 * run.quantizer.codebook_size * run.quantizer.region
    return total


def _states(network: Network, zero: Zero) -> States:
    return engine_states(network.groups, zero, muon=network.muon)


def _joined(name: str, lines: Iterable[Line]) -> Line:
    rows = list(lines)
    return Line(name, sum(r.passes for r in rows), sum(r.step for r in rows), sum(r.host for r in rows))


def _budget(lines: list[Line], kept_per_image: float, copy: int, states: States) -> MemoryBudget:
    """`copy`: bytes of the averaged weights of a validation, whole on every rank."""
    moving = sum(line.passes for line in lines if line.name in ("activations", "logits and loss"))
    lines += [
        Line(f"fragmentation ({100 * FRAGMENTATION:.0f} % of activations)", int(FRAGMENTATION * moving), 0),
        Line("CUDA, cuBLAS, NCCL (assumed)", FIXED, FIXED),
    ]
    notes = []
    if states.gradients > states.weights * 2 and states.places.get("gradients") != "host":
        notes.append("ZeRO-1 under bf16 keeps unsharded fp32 gradients on every GPU, zero2 shards them")
    standing = sum(line.step for line in lines if line.name != SCRATCH)
    return MemoryBudget(tuple(lines), kept_per_image, standing + copy if copy else 0, tuple(notes))
