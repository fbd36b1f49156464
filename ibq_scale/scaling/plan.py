"""What a run needs: parameters, FLOPs, memory of a GPU, a checkpoint, and time where a rate is known or assumed.

Everything is computed on the meta device from the config alone, so a plan takes seconds and no GPU. What is assumed is
said to be: a GPU that is not in the table has no peak, and so no time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ibq_scale.config.batch import codebook_group_size
from ibq_scale.config.deepspeed import deepspeed_config, zero_words
from ibq_scale.config.run import AnyRun, ARRun, TokenizerRun
from ibq_scale.documents import read_json
from ibq_scale.errors import UserError
from ibq_scale.models.fp8 import EAGER
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.scaling import networks
from ibq_scale.scaling.budget import MemoryBudget, ar_budget, checkpoint_bytes, tokenizer_budget
from ibq_scale.scaling.communication import Transfer, codebook_transfers, engine_transfers, tokenizer_transfers
from ibq_scale.scaling.devices import DEVICES, Device, named
from ibq_scale.scaling.fabric import Fabric
from ibq_scale.scaling.flops import AR_FORMULA, TOKENIZER_FORMULA, ar_executed, ar_flops, step_flops
from ibq_scale.scaling.roofline import StepTime, Work, step_time
from ibq_scale.zero.memory import Zero

# Of rates that a model's FLOPs explain: a measured file of another model is refused beyond it.
SAME_FLOPS = 1e-3


@dataclass(frozen=True)
class Machine:
    """What is asked for. `device`: a GPU's name; `memory`: bytes of one GPU, where the name does not tell; `net`:
    bytes/s of a GPU to other nodes, None for `fabric.NDR`.
    """

    gpus: int = 1
    nodes: int = 1
    device: str | None = None
    memory: float | None = None
    net: float | None = None

    @property
    def world(self) -> int:
        """Ranks, one a GPU."""
        return self.gpus * self.nodes

    @property
    def known(self) -> Device | None:
        """The GPU in the table, None for one that is not."""
        return None if self.device is None else named(self.device)

    @property
    def gpu_memory(self) -> float | None:
        """Bytes of one GPU, None where nobody said."""
        return self.memory or (self.known.memory if self.known else None)


@dataclass(frozen=True)
class Rate:
    """A measured rate, from a benchmark's JSON: of one GPU, and of what model."""

    source: str
    device: str
    images_per_s: float
    flops_per_image: float

    @staticmethod
    def read(path: Path) -> Rate:
        """From what `ibq-scale bench ar` or `bench tokenizer` printed with --json. UserError for anything else."""
        try:
            report = read_json(path)
            rate = float(report["images_per_s"]) / int(report["ranks"])
            return Rate(str(path), str(report["device"]), rate, float(report["flops_per_image"]))
        except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError):
            raise UserError(
                f"{path} is no report of a benchmark: write one with ibq-scale bench ar PRESET --json > {path.name}"
            ) from None


@dataclass(frozen=True)
class Flops:
    """Of training, an image: what is needed, by part, and what is done, with what is computed again. `tf32`: of that,
    what runs at half of bf16's rate.
    """

    parts: dict[str, float]
    executed: float
    formula: str
    tf32: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Time:
    """Of the whole run. `basis` says what it rests on; the rest is None where it rests on nothing."""

    basis: str
    images_per_s: float | None = None
    step_s: float | None = None
    hours: float | None = None
    gpu_hours: float | None = None


@dataclass(frozen=True)
class Plan:
    """See the module's docstring. Bytes and FLOP/s are plain numbers, of one GPU where not said otherwise.

    `communication`: of a step. `storage_bytes`: of all checkpoints that are kept, and one that is being written.
    `roofline`: where a bf16 run's GPU is known.
    """

    name: str
    task: str
    precision: str
    deepspeed: str
    zero_stage: int
    machine: Machine
    micro_batch: int
    accumulation: int
    global_batch: int
    steps: int
    samples: int
    tokens: int
    parameters: dict[str, int]
    frozen: dict[str, int]
    flops: Flops
    memory: MemoryBudget
    checkpoint_bytes: int
    storage_bytes: int
    communication: tuple[Transfer, ...]
    time: Time
    roofline: StepTime | None
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool | None:
        """None where the GPU's memory is unknown."""
        memory = self.machine.gpu_memory
        return None if memory is None else self.memory.peak <= memory

    @property
    def sharding(self) -> str:
        """In words."""
        return zero_words(self.zero_stage, self.machine.world)

    @property
    def flops_per_step(self) -> float:
        return self.flops.total * self.global_batch


def make_plan(run: AnyRun, machine: Machine, *, mfu: float, measured: Rate | None = None) -> Plan:
    """Plans a run. UserError for what training refuses too: batches, the DeepSpeed JSON, the codebook's groups."""
    config = deepspeed_config(run, machine.world)
    zero = Zero.of(config, world=machine.world)
    if isinstance(run, TokenizerRun):
        tokens = run.model.tokens
        flops = _tokenizer_flops(run, machine.world)
        nets = [networks.autoencoder(run), networks.discriminator(run)]
        rows = run.quantizer.codebook_size * run.quantizer.dim
        learns = KINDS[run.quantizer.kind].learns == "rows"
        codebook = {"codebook": rows} if learns else {}
        lpips = networks.perceptual(run)
        frozen = ({} if learns else {"codebook": rows}) | ({"LPIPS": lpips} if lpips else {})
        budget = tokenizer_budget(run, zero, nets[0], nets[1], lpips)
        transfers = tuple(tokenizer_transfers(run, zero, nets[0], nets[1]))
    else:
        tokens, codebook, frozen = run.model.tokens, {}, {}
        parts = ar_flops(run.model)
        flops = Flops(parts.training(), ar_executed(run.model), AR_FORMULA)
        nets = [networks.transformer(run)]
        budget = ar_budget(run, zero, nets[0])
        transfers = tuple(engine_transfers(nets[0], zero))
    parameters: dict[str, int] = {}
    for net in nets:
        parameters |= net.parts
    train = run.train
    size = checkpoint_bytes(run, nets)
    # A product at half the rate takes the time of two.
    work = Work(flops.executed + flops.tf32, budget.kept_per_image, sum(net.parameters for net in nets))
    overlap = bool(config.get("zero_optimization", {}).get("overlap_comm"))
    return Plan(
        name=run.name,
        task=run.task,
        precision=train.precision,
        deepspeed=run.deepspeed.config,
        zero_stage=zero.stage,
        machine=machine,
        micro_batch=train.micro_batch,
        accumulation=zero.accumulation,
        global_batch=train.global_batch,
        steps=train.total_steps,
        samples=train.total_samples,
        tokens=train.total_samples * tokens,
        parameters=parameters | codebook,
        frozen=frozen,
        flops=flops,
        memory=budget,
        checkpoint_bytes=size,
        storage_bytes=size * _kept(run),
        communication=transfers,
        time=_time(run, machine, flops.total, mfu, measured),
        roofline=_roofline(run, machine, zero, work, transfers, overlap=overlap),
        notes=(*_notes(run, machine, budget), *_codebook_note(run, machine, zero)),
    )


def _codebook_note(run: AnyRun, machine: Machine, zero: Zero) -> list[str]:
    """Where other groups would exchange the codebook in less than half of the time."""
    device = machine.known
    if not isinstance(run, TokenizerRun) or not KINDS[run.quantizer.kind].reaches_all_codes or device is None:
        return []
    world, codes = machine.world, run.quantizer.codebook_size
    tokens = run.train.micro_batch * run.model.tokens
    fabric = Fabric.of(device, machine.gpus, net=machine.net)

    def seconds(group: int) -> float:
        transfers = codebook_transfers(codes, run.quantizer.dim, tokens, zero.accumulation, group, world)
        return sum(fabric.seconds(transfer, world) for transfer in transfers)

    mine = codebook_group_size(run, world)
    best = min((g for g in range(1, world + 1) if world % g == 0 and codes % g == 0), key=seconds)
    if seconds(best) > 0.5 * seconds(mine):
        return []
    return [
        f"the codebook over groups of {mine} GPUs takes {1000 * seconds(mine):.3g} ms a step to exchange (links: "
        f"assumed); codebook_group={best} would take {1000 * seconds(best):.3g} ms"
    ]


def _kept(run: AnyRun) -> int:
    """Checkpoints at the most."""
    train = run.train
    for_good = train.total_steps // train.keep_every if train.keep_every else 0
    return train.keep_checkpoints + 1 + for_good + (train.keep_best is not None)


def _roofline(
    run: AnyRun, machine: Machine, zero: Zero, work: Work, transfers: tuple[Transfer, ...], *, overlap: bool
) -> StepTime | None:
    device = machine.known
    if device is None or run.train.precision != "bf16":
        return None
    images = run.train.micro_batch * zero.accumulation
    fabric = Fabric.of(device, machine.gpus, net=machine.net)
    return step_time(work, zero, device, fabric, transfers, images, overlap=overlap)


def _tokenizer_flops(run: TokenizerRun, world: int) -> Flops:
    backend = "tiled" if run.quantizer.backend == "tiled" else "triton"
    step = step_flops(run, backend=backend, sharded=(run.codebook_group or world) > 1)
    parts = {
        "autoencoder": step.autoencoder,
        "quantizer": step.quantizer,
        "discriminator": step.discriminator,
        "LPIPS": step.perceptual,
    }
    again = step.quantizer_executed - step.quantizer
    if run.model.activation_checkpointing:
        again += step.autoencoder / 3
    half = step.quantizer_executed if run.quantizer.logit_precision == "tf32" else 0.0
    return Flops(parts, step.total + again, TOKENIZER_FORMULA, half)


def _time(run: AnyRun, machine: Machine, flops: float, mfu: float, measured: Rate | None) -> Time:
    if measured is not None:
        if abs(measured.flops_per_image / flops - 1) > SAME_FLOPS:
            raise UserError(
                f"{measured.source} was measured with another model: {measured.flops_per_image / 1e9:.4g} GFLOP an "
                f"image there, {flops / 1e9:.4g} here"
            )
        basis = f"measured on {measured.device} ({measured.source}); more GPUs are taken to lose nothing"
        return _at(run, machine, measured.images_per_s * machine.world, basis)
    device = machine.known
    if device is None:
        return Time("no time: " + ("no --device" if machine.device is None else _unknown(machine.device)))
    if run.train.precision != "bf16":
        return Time(f"no time: the peak of {device.name} is known for bf16, this run computes in fp32")
    basis = f"ASSUMED: {100 * mfu:.3g} % of {device.name}'s {device.peak_bf16 / 1e12:.4g} TFLOP/s (MFU); not measured"
    return _at(run, machine, machine.world * device.peak_bf16 * mfu / flops, basis)


def _at(run: AnyRun, machine: Machine, images_per_s: float, basis: str) -> Time:
    hours = run.train.total_samples / images_per_s / 3600
    return Time(basis, images_per_s, run.train.global_batch / images_per_s, hours, hours * machine.world)


def _unknown(name: str) -> str:
    return f"{name} is not in the table ({', '.join(DEVICES)})"


def _notes(run: AnyRun, machine: Machine, budget: MemoryBudget) -> tuple[str, ...]:
    notes = list(budget.notes)
    if machine.device is not None and machine.known is None:
        notes.append(f"{_unknown(machine.device)}: no time" + ("" if machine.memory else ", and --memory is needed"))
    if run.model.compile:
        notes.append("model.compile keeps less for the backward pass than is counted here")
    if isinstance(run, ARRun) and run.model.fp8:
        notes.append("model.fp8: products of the blocks are quicker than the bf16 peak that the time counts with")
        notes += [EAGER] if not run.model.compile else []
    if isinstance(run, ARRun) and run.ema_decay == 0:
        notes.append("no EMA of the weights (ema_decay=0)")
    return tuple(notes)
