"""Simulates many machines: strong and weak scaling of a transformer by ZeRO stage, and of a codebook by its groups.

Times come from `roofline`, with the volumes of `communication` on the links of `fabric`. *Strong*: the config's global
batch on more and more GPUs, with less work for each. *Weak*: each GPU keeps its micro-batch, and the global batch
grows. More GPUs pay as long as each doubling gives at least `PAYS` times the images a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ibq_scale.config.deepspeed import deepspeed_config, refusal
from ibq_scale.config.run import AnyRun, ARRun, TokenizerRun
from ibq_scale.errors import UserError
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.scaling import networks
from ibq_scale.scaling.budget import (
    CODEBOOK_STATES,
    FIXED,
    FRAGMENTATION,
    TOKEN_TENSORS,
    MemoryBudget,
    ar_budget,
    ema_bytes,
    engine_lines,
)
from ibq_scale.scaling.communication import codebook_transfers, engine_transfers
from ibq_scale.scaling.devices import Device
from ibq_scale.scaling.fabric import Fabric
from ibq_scale.scaling.flops import TRITON_PRODUCTS, ar_executed
from ibq_scale.scaling.networks import Network
from ibq_scale.scaling.plan import require_fp8
from ibq_scale.scaling.roofline import MEMORY, OPTIMIZER_BYTES, PRODUCTS, GpuWork, StepTime, step_time
from ibq_scale.zero.memory import FP32, Zero, engine_states

Mode = Literal["strong", "weak"]
STAGES = (1, 2, 3)
PAYS = 1.5
CODEBOOKS = tuple(2**power for power in range(14, 23, 2))
# tf32 products (the quantizer's in training) have half of bf16's peak on every GPU of the table.
TF32 = 0.5


@dataclass(frozen=True)
class Row:
    """A layout of a transformer's step. `efficiency`: images a second and GPU over the first row's. `peak`: bytes."""

    mode: Mode
    stage: int
    gpus: int
    micro_batch: int
    accumulation: int
    time: StepTime
    images_per_s: float
    efficiency: float
    peak: float
    fits: bool
    pays: bool


@dataclass(frozen=True)
class CodebookRow:
    """A codebook over groups of `group` ranks. Seconds per step of one micro-batch. `bytes`: of a GPU."""

    codes: int
    gpus: int
    group: int
    products: float
    optimizer: float
    exchange: float
    bytes: float
    fits: bool

    @property
    def total(self) -> float:
        return self.products + self.optimizer + self.exchange


def worlds(first: int, most: int) -> list[int]:
    """`first`, doubled up to `most`."""
    found = [first]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def transformer_rows(run: AnyRun, device: Device, fabric: Fabric, most: int) -> list[Row]:
    """Strong and weak scaling for each ZeRO stage, without `refused_stages`.

    UserError for a tokenizer, fp32, or an indivisible batch.
    """
    if not isinstance(run, ARRun):
        raise UserError(f"{run.name} is a tokenizer: only its codebook is simulated beyond one machine")
    if run.train.precision != "bf16":
        raise UserError(f"{run.name} computes in fp32, but the known peaks are for bf16: set train.precision=bf16")
    require_fp8(run, device)
    rehearsed, refused = _Rehearsed.of(run), refused_stages(run)
    rows = []
    for stage in (stage for stage in STAGES if stage not in refused):
        for mode in ("strong", "weak"):
            found = [r for n in worlds(fabric.node, most) if (r := rehearsed.row(mode, stage, n, device, fabric))]
            rows += _compared(found)
    if not rows:
        raise UserError(f"train.global_batch={run.train.global_batch} does not divide by {fabric.node} GPUs")
    return rows


def codebook_rows(run: AnyRun, device: Device, fabric: Fabric, most: int, taken: float) -> list[CodebookRow]:
    """Each codebook size on each number of GPUs, over groups of every size from one (replicated) to all.

    `taken`: bytes of a GPU for the rest of the run. UserError for a transformer, and for codes without an exchange.
    """
    if not isinstance(run, TokenizerRun):
        raise UserError(f"{run.name} is a transformer and has no codebook")
    if not KINDS[run.quantizer.kind].reaches_all_codes:
        raise UserError(f"{run.name} has a quantizer of kind {run.quantizer.kind}: only IBQ's codebook is simulated")
    tokens = run.train.micro_batch * run.model.tokens
    rows = []
    for codes in CODEBOOKS:
        for world in worlds(fabric.node, most):
            for group in dict.fromkeys([1, *worlds(fabric.node, world)]):
                rows.append(_codebook(codes, run.quantizer.dim, tokens, group, world, device, fabric, taken))
    return rows


def refused_stages(run: AnyRun) -> dict[int, str]:
    """The ZeRO stages that training refuses for this run, each with the reason."""
    reasons = {stage: refusal(run, {"stage": stage}) for stage in STAGES}
    return {stage: reason for stage, reason in reasons.items() if reason is not None}


def ends(rows: Sequence[Row]) -> list[tuple[Mode, int, int]]:
    """(mode, stage, most GPUs that pay and fit) of each stage with rows. 0 if not even the first fits."""
    found = []
    for mode in ("strong", "weak"):
        for stage in sorted({row.stage for row in rows}):
            mine = [r.gpus for r in rows if (r.mode, r.stage) == (mode, stage) and r.pays and r.fits]
            found.append((mode, stage, max(mine, default=0)))
    return found  # type: ignore[return-value]


def best_groups(rows: Sequence[CodebookRow]) -> list[CodebookRow]:
    """The fastest fitting layout of each size and number of GPUs, if any fits."""
    keys = dict.fromkeys((r.codes, r.gpus) for r in rows)
    fitting = {key: [r for r in rows if (r.codes, r.gpus) == key and r.fits] for key in keys}
    return [min(found, key=lambda r: r.total) for found in fitting.values() if found]


@dataclass(frozen=True)
class _Rehearsed:
    """The common part of all layouts, rehearsed once, on one GPU."""

    run: ARRun
    zero: Zero
    network: Network
    budget: MemoryBudget
    work: GpuWork
    overlap: bool

    @staticmethod
    def of(run: ARRun) -> _Rehearsed:
        # On one rank: reads the JSON's sharding without the check of batch sizes.
        train = run.train.model_copy(update={"global_batch": run.train.micro_batch})
        config = deepspeed_config(run.model_copy(update={"train": train}), 1)
        zero = Zero.of(config, world=1)
        network = networks.transformer(run)
        # As for ZeRO-2 and 3. ZeRO-1 keeps more, counted in its states.
        budget = ar_budget(run, replace(zero, stage=2), network)
        work = GpuWork(ar_executed(run.model), budget.kept_per_image, network.parameters)
        return _Rehearsed(run, zero, network, budget, work, bool(config["zero_optimization"].get("overlap_comm")))

    def row(self, mode: Mode, stage: int, world: int, device: Device, fabric: Fabric) -> Row | None:
        """One layout. None if the global batch does not divide."""
        most, images = self.run.train.micro_batch, self.run.train.micro_batch
        if mode == "strong":
            if self.run.train.global_batch % world:
                return None
            images = self.run.train.global_batch // world
        micro = max(m for m in range(1, min(most, images) + 1) if images % m == 0)
        zero = replace(self.zero, stage=stage, world=world, accumulation=images // micro)
        transfers = engine_transfers(self.network, zero)
        work = replace(self.work, flops=self.work.flops + self.network.muon_flops / (world * images))
        time = step_time(work, zero, device, fabric, transfers, images, overlap=self.overlap)
        peak = self._peak(zero, micro)
        rate = world * images / time.total
        return Row(mode, stage, world, micro, images // micro, time, rate, 1.0, peak, peak <= device.memory, True)

    def _peak(self, zero: Zero, micro: int) -> float:
        """States of this layout, and the rehearsed activations, scaled."""
        states = engine_states(self.network.groups, zero, muon=self.network.muon)
        lines = engine_lines("", states, ema_bytes(self.network, zero, self.run.ema_decay))
        rehearsed = sum(line.passes for line in self.budget.lines if line.name in ("activations", "logits and loss"))
        moving = (1 + FRAGMENTATION) * rehearsed * micro / self.run.train.micro_batch
        passes, step = sum(line.passes for line in lines) + moving, sum(line.step for line in lines)
        return max(passes, step) + FIXED


def _compared(rows: Sequence[Row]) -> list[Row]:
    """Rows with efficiencies, and whether each doubling up to the row has paid."""
    compared: list[Row] = []
    for row in rows:
        efficiency = row.images_per_s / row.gpus / (rows[0].images_per_s / rows[0].gpus)
        before = compared[-1] if compared else None
        doublings = 1.0 if before is None else row.gpus / before.gpus / 2
        pays = before is None or (before.pays and row.images_per_s >= PAYS * doublings * before.images_per_s)
        compared.append(replace(row, efficiency=efficiency, pays=pays))
    return compared


def _codebook(
    codes: int, dim: int, tokens: int, group: int, world: int, device: Device, fabric: Fabric, taken: float
) -> CodebookRow:
    # Independent of the layout: a rank has 1/W of the codes, and the tokens of W ranks.
    products = TRITON_PRODUCTS * 2.0 * tokens * codes * dim / (TF32 * PRODUCTS * device.peak_bf16)
    rows = codes // group
    optimizer = (OPTIMIZER_BYTES + 2 * FP32) * rows * dim / (MEMORY * device.bandwidth)
    transfers = codebook_transfers(codes, dim, tokens, 1, group, world)
    exchange = sum(fabric.seconds(transfer, world) for transfer in transfers)
    size = CODEBOOK_STATES * FP32 * rows * dim + TOKEN_TENSORS * FP32 * tokens * group * dim
    return CodebookRow(codes, world, group, products, optimizer, exchange, size, taken + size <= device.memory)
