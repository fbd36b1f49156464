"""Needs of a run: parameters, FLOPs, GPU memory, checkpoint size, and time for a known or assumed rate.

Everything is computed on the meta device from the config alone, so a plan takes seconds and no GPU. Assumptions are
marked. A GPU outside the table has no peak rate, and its plan no time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ibq_scale.config.batch import codebook_group_size
from ibq_scale.config.deepspeed import deepspeed_config, zero_words
from ibq_scale.config.layers import with_values
from ibq_scale.config.run import AnyRun, ARRun, TokenizerRun
from ibq_scale.documents import read_json
from ibq_scale.errors import UserError
from ibq_scale.models.fp8 import EAGER, check_fp8_sizes
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.scaling import networks
from ibq_scale.scaling.activation_memory import ar_activation_memory, tokenizer_activation_memory
from ibq_scale.scaling.budget import MemoryBudget, ar_budget, checkpoint_bytes, tokenizer_budget
from ibq_scale.scaling.communication import Transfer, codebook_transfers, engine_transfers, tokenizer_transfers
from ibq_scale.scaling.devices import DEVICES, WITHOUT_FP8, Device, named
from ibq_scale.scaling.fabric import LINK_SHARE, Fabric
from ibq_scale.scaling.flops import AR_FORMULA, ar_executed, ar_flops, step_flops, tokenizer_formula
from ibq_scale.scaling.profile import SAME_FLOPS, MachineProfile, StepRate, nearest
from ibq_scale.scaling.roofline import GpuWork, StepTime, step_time
from ibq_scale.zero.memory import Zero


@dataclass(frozen=True)
class Machine:
    """The requested machine. `device`: a GPU's name. `memory`: bytes of one GPU, for an unknown name. `net`: bytes/s of
    a GPU to other nodes, None for `fabric.NDR`. `profile`: what is measured on this device. `cpus`: of a rank, None
    where its nodes are not known.
    """

    gpus: int = 1
    nodes: int = 1
    device: str | None = None
    memory: float | None = None
    net: float | None = None
    profile: MachineProfile | None = None
    cpus: int | None = None

    @property
    def world(self) -> int:
        """Ranks, one per GPU."""
        return self.gpus * self.nodes

    @property
    def known(self) -> Device | None:
        """The GPU in the table, None for an unknown one."""
        return None if self.device is None else named(self.device)

    @property
    def gpu_memory(self) -> float | None:
        """Bytes of one GPU, None if unknown."""
        return self.memory or (self.known.memory if self.known else None)

    @property
    def fabric(self) -> Fabric | None:
        """The links: as given, as measured on this device, or of the data sheet. None for an unknown GPU."""
        if self.known is None:
            return None
        # A measured rate is one of collectives already.
        inner, outer = self._link(between_nodes=False), self._link(between_nodes=True)
        return Fabric.of(self.known, self.gpus, link=inner, net=self.net or outer)

    def _link(self, *, between_nodes: bool) -> float | None:
        found = self.profile.link(between_nodes=between_nodes) if self.profile else None
        if found is None:
            return None
        # To other nodes each of a node's ranks has its own network card.
        return found.bytes_per_s / LINK_SHARE / (found.ranks / found.nodes if between_nodes else 1)


@dataclass(frozen=True)
class Rate:
    """A measured rate of one GPU from a benchmark's JSON, with its model."""

    source: str
    device: str
    images_per_s: float
    flops_per_image: float

    @staticmethod
    def read(path: Path) -> Rate:
        """Reads the JSON of `ibq-scale bench ar` or `bench tokenizer`. UserError for other files."""
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
    """Training FLOPs per image: required, by part, and executed, with recomputation. `tf32`: the executed part at half
    of bf16's rate. `optimizer`: an image's share of Muon's iterations, all ranks' together.
    """

    parts: dict[str, float]
    executed: float
    formula: str
    tf32: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Time:
    """Time of the whole run. `basis`: origin of the rate. The other fields are None without a rate. `measured`: whether
    it is a rate of this model.
    """

    basis: str
    images_per_s: float | None = None
    step_s: float | None = None
    hours: float | None = None
    gpu_hours: float | None = None
    measured: bool = False


@dataclass(frozen=True)
class Plan:
    """See the module's docstring. Bytes and FLOP/s are plain numbers, per GPU unless noted.

    `communication`: per step. `storage_bytes`: of all kept checkpoints and one being written. `roofline`: for a bf16
    run on a known GPU.
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
        """Whether the peak fits, None for an unknown memory."""
        memory = self.machine.gpu_memory
        return None if memory is None else self.memory.peak <= memory

    @property
    def sharding(self) -> str:
        """The sharding in words."""
        return zero_words(self.zero_stage, self.machine.world)

    @property
    def predicted_s(self) -> float | None:
        """Seconds of a step: by a measured rate of this model, else by the roofline. None without either."""
        if self.time.measured:
            return self.time.step_s
        return None if self.roofline is None else self.roofline.total

    @property
    def flops_per_step(self) -> float:
        return self.flops.total * self.global_batch


def make_plan(run: AnyRun, machine: Machine, *, mfu: float, measured: Rate | None = None) -> Plan:
    """Plans a run. UserError for configs refused by training: batches, DeepSpeed's JSON, the codebook's groups, fp8."""
    config = deepspeed_config(run, machine.world)
    require_fp8(run, machine.known)
    zero = Zero.of(config, world=machine.world)
    if isinstance(run, TokenizerRun):
        tokens = run.model.tokens
        flops = _tokenizer_flops(run, machine.world)
        nets = [networks.autoencoder(run), networks.discriminator(run.discriminator)]
        rows = run.quantizer.codebook_size * run.quantizer.dim
        learnt = KINDS[run.quantizer.kind].learns
        learns = learnt == "rows"
        codebook = {"codebook": rows} if learns else {}
        if learnt == "layer":
            codebook = {"codebook's layer": run.quantizer.dim * (run.quantizer.dim + 1)}
        still = networks.frozen(run)
        frozen = ({} if learns else {"codebook": rows}) | still
        budget = tokenizer_budget(run, zero, nets[0], nets[1], still)
        transfers = tuple(tokenizer_transfers(run, zero, nets[0], nets[1]))
    else:
        tokens, codebook, frozen = run.model.tokens, {}, {}
        nets = [networks.transformer(run)]
        # Without ZeRO every rank computes them all.
        by_muon = nets[0].muon_flops * (machine.world if zero.stage == 0 else 1) / run.train.global_batch
        flops = Flops(ar_flops(run.model), ar_executed(run.model), AR_FORMULA, optimizer=by_muon)
        budget = ar_budget(run, zero, nets[0])
        transfers = tuple(engine_transfers(nets[0], zero))
    parameters: dict[str, int] = {}
    for net in nets:
        parameters |= net.parts
    train = run.train
    size = checkpoint_bytes(run, nets)
    # A product at half the rate takes the time of two.
    done = flops.executed + flops.tf32 + flops.optimizer
    work = GpuWork(done, _moved_per_image(run, budget), sum(net.parameters for net in nets))
    overlap = bool(config.get("zero_optimization", {}).get("overlap_comm"))
    roofline = _roofline(run, machine, zero, work, transfers, overlap=overlap)
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
        time=_time(run, machine, flops, roofline, mfu, measured),
        roofline=roofline,
        notes=(*_notes(run, machine, budget), *_codebook_note(run, machine, zero)),
    )


def require_fp8(run: AnyRun, device: Device | None) -> None:
    """UserError if training would refuse this run's fp8 on the device."""
    if not isinstance(run, ARRun) or not run.model.fp8:
        return
    check_fp8_sizes(run)
    if device is not None and device.name in WITHOUT_FP8:
        raise UserError(f"model.fp8=true needs a GPU of compute capability 8.9 or more, not {device.name}")


def _codebook_note(run: AnyRun, machine: Machine, zero: Zero) -> list[str]:
    """Where other groups would exchange the codebook in less than half of the time."""
    if not isinstance(run, TokenizerRun) or machine.known is None:
        return []
    mine, best = codebook_group_size(run, machine.world), fastest_group(run, machine)
    took, least = (_codebook_seconds(run, machine, group, zero.accumulation) for group in (mine, best))
    if least > 0.5 * took or took == 0:
        return []
    return [
        f"the codebook over groups of {mine} GPUs takes {1000 * took:.3g} ms a step to exchange (links: assumed); "
        f"codebook_group={best} would take {1000 * least:.3g} ms"
    ]


def fastest_group(run: TokenizerRun, machine: Machine) -> int:
    """The number of ranks to a codebook that takes the fewest seconds of exchange a step.

    0, for as many ranks as divide the codebook, where the links are not known or the codes are not exchanged.
    """
    if machine.known is None or not KINDS[run.quantizer.kind].reaches_all_codes:
        return 0
    world, codes = machine.world, run.quantizer.codebook_size
    groups = [g for g in range(1, world + 1) if world % g == 0 and codes % g == 0]
    # A step has the same tokens however they are cut into micro-batches.
    return min(groups, key=lambda group: _codebook_seconds(run, machine, group, 1))


def _codebook_seconds(run: TokenizerRun, machine: Machine, group: int, accumulation: int) -> float:
    fabric = machine.fabric
    if fabric is None or not KINDS[run.quantizer.kind].reaches_all_codes:
        return 0.0
    world, quantizer = machine.world, run.quantizer
    tokens = run.train.global_batch // (world * accumulation) * run.model.tokens
    transfers = codebook_transfers(quantizer.codebook_size, quantizer.dim, tokens, accumulation, group, world)
    return sum(fabric.seconds(transfer, world) for transfer in transfers)


def _moved_per_image(run: AnyRun, budget: MemoryBudget) -> float:
    """Bytes of an image's activations. What is computed again is written and read again, so it counts like the rest."""
    if run.model.activation_checkpointing in (False, "none"):
        return budget.kept_per_image
    if isinstance(run, TokenizerRun):
        plain = with_values(run, {"model.activation_checkpointing": False})
        held = tokenizer_activation_memory(plain, keeps_gradients=False)
    else:
        held = ar_activation_memory(with_values(run, {"model.activation_checkpointing": "none"}), keeps_gradients=False)
    return held.kept / run.train.micro_batch


def _kept(run: AnyRun) -> int:
    """The largest number of kept checkpoints."""
    train = run.train
    for_good = train.total_steps // train.keep_every if train.keep_every else 0
    return train.keep_checkpoints + 1 + for_good + (train.keep_best is not None)


def _roofline(
    run: AnyRun, machine: Machine, zero: Zero, work: GpuWork, transfers: tuple[Transfer, ...], *, overlap: bool
) -> StepTime | None:
    device, fabric = machine.known, machine.fabric
    if device is None or fabric is None or run.train.precision != "bf16":
        return None
    images = run.train.micro_batch * zero.accumulation
    return step_time(work, zero, device, fabric, transfers, images, overlap=overlap)


def _tokenizer_flops(run: TokenizerRun, world: int) -> Flops:
    backend = "triton" if run.quantizer.backend == "auto" else run.quantizer.backend
    step = step_flops(run, backend=backend, sharded=(run.codebook_group or world) > 1)
    parts = {
        "autoencoder": step.autoencoder,
        "quantizer": step.quantizer,
        "discriminator": step.discriminator,
        "LPIPS": step.perceptual,
        **({"feature loss": step.features} if step.features else {}),
    }
    again = step.quantizer_executed - step.quantizer
    if run.model.activation_checkpointing:
        again += step.autoencoder / 3
    half = step.quantizer_executed if run.quantizer.logit_precision == "tf32" else 0.0
    return Flops(parts, step.total + again, tokenizer_formula(run.quantizer), half)


def measured_rates(run: AnyRun, machine: Machine, flops: float) -> list[StepRate]:
    """This machine's measured rates of the run's model."""
    if machine.profile is None:
        return []
    return machine.profile.rates_of(run.task, run.train.precision, flops, compiled=run.model.compile)


def _time(
    run: AnyRun, machine: Machine, needed: Flops, roofline: StepTime | None, mfu: float, measured: Rate | None
) -> Time:
    flops = needed.total
    if measured is not None:
        if abs(measured.flops_per_image / flops - 1) > SAME_FLOPS:
            raise UserError(
                f"{measured.source} was measured with another model: {measured.flops_per_image / 1e9:.4g} GFLOP an "
                f"image there, {flops / 1e9:.4g} here"
            )
        basis = f"measured on {measured.device} ({measured.source}); assumes no loss with more GPUs"
        return _at(run, machine, measured.images_per_s * machine.world, basis, measured=True)
    rate = nearest(measured_rates(run, machine, flops), run.train.micro_batch)
    if rate is not None:
        seconds = (needed.executed + needed.optimizer) * run.train.global_batch / machine.world / rate.flops_per_s
        # The rate of several ranks includes the exchange between them.
        seconds += roofline.exposed if roofline is not None and rate.ranks == 1 else 0.0
        basis = f"{rate} (micro-batch {rate.micro_batch}, {rate.ranks} rank{'s' * (rate.ranks > 1)})"
        basis += "; assumes no loss with more ranks" * (roofline is None and machine.world > rate.ranks)
        return _at(run, machine, run.train.global_batch / seconds, basis, measured=True)
    device = machine.known
    if device is None:
        return Time("no time: " + ("no --device" if machine.device is None else _unknown(machine.device)))
    if run.train.precision != "bf16":
        return Time(f"no time: the peak of {device.name} is known for bf16, this run computes in fp32")
    basis = f"ASSUMED: {100 * mfu:.3g} % of {device.name}'s {device.peak_bf16 / 1e12:.4g} TFLOP/s (MFU); not measured"
    return _at(run, machine, machine.world * device.peak_bf16 * mfu / flops, basis)


def _at(run: AnyRun, machine: Machine, images_per_s: float, basis: str, *, measured: bool = False) -> Time:
    hours = run.train.total_samples / images_per_s / 3600
    return Time(basis, images_per_s, run.train.global_batch / images_per_s, hours, hours * machine.world, measured)


def _unknown(name: str) -> str:
    return f"{name} is not in the table ({', '.join(DEVICES)})"


def _notes(run: AnyRun, machine: Machine, budget: MemoryBudget) -> tuple[str, ...]:
    notes = list(budget.notes)
    if machine.device is not None and machine.known is None:
        notes.append(f"{_unknown(machine.device)}: no time" + ("" if machine.memory else ", and --memory is needed"))
    if isinstance(run, TokenizerRun) and run.data.aspects:
        sizes = ", ".join(f"{width} × {height}" for width, height in run.crop_sizes)
        notes.append(f"data.aspects: steps of {sizes} pixels, none with more memory or FLOPs than the square here")
    if run.model.compile:
        notes.append("model.compile keeps less for the backward pass than is counted here")
    if isinstance(run, ARRun) and run.model.fp8:
        notes.append("model.fp8: products of the blocks are quicker than the bf16 peak that the time counts with")
        notes += [EAGER] if not run.model.compile else []
    if isinstance(run, ARRun) and run.ema_decay == 0:
        notes.append("no EMA of the weights (ema_decay=0)")
    return tuple(notes)
