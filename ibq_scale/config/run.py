"""Config of a run: data, losses, optimizer, schedule, length, parallel layout, logging.

`TokenizerRun` and `ARRun` are what a YAML file describes; the trainer reads nothing else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ibq_scale.config.base import Section
from ibq_scale.config.models import (
    AutoencoderConfig,
    DiscriminatorConfig,
    NonNegativeFloat,
    PositiveInt,
    Probability,
    QuantizerConfig,
    TransformerConfig,
)

NonNegativeInt = Annotated[int, Field(ge=0)]


class DataConfig(Section):
    """Where samples come from and in which order.

    `train`: a folder or ``s3://bucket/prefix`` that holds a ``manifest.json``, or several: ``[a, b]``.
    `weights`: shares of the stream that several sources get, by position (rounded to 1/4096); without them the sources
    are one data set, every sample once an epoch.
    `cache_dir`: local folder for downloaded shards, of at most `cache_bytes` (workers then hold no S3 client). ``auto``
    takes one in the temporary folder (SLURM_TMPDIR, TMPDIR) for ``s3://`` sources, none for folders; ``null`` reads
    each sample by a request of its own.
    `lanes`, `window`: shuffle geometry, part of the order's definition (see data/order.py).
    `augment`: random crop, or centre crop; `flip`: mirror half of the images.
    `bad_samples`: damaged samples, each replaced by a neighbour and logged, that a run puts up with before it stops.
    """

    train: str | tuple[str, ...] = "???"
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    cache_dir: str | None = "auto"
    cache_bytes: PositiveInt = 50 * 10**9
    workers: NonNegativeInt = 4
    lanes: PositiveInt = 64
    window: PositiveInt = 4
    augment: Literal["random_crop", "center_crop"] = "random_crop"
    flip: bool = False
    bad_samples: NonNegativeInt = 100

    @property
    def sources(self) -> tuple[str, ...]:
        """`train` as a tuple."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @model_validator(mode="after")
    def _weights_fit(self) -> DataConfig:
        if not self.sources or (self.weights and len(self.weights) != len(self.sources)):
            raise ValueError(f"weights: {len(self.weights)} of them for {len(self.sources)} sources: one each, or none")
        return self


class TokenizerLossConfig(Section):
    """Weights of the tokenizer's loss terms.

    Published: 1·L1 + 1·LPIPS(VGG) + 0.1·GAN + 1·quantization + 0.05·entropy.
    `adversarial`: ``constant`` takes `adversarial_weight` as it is (published); ``adaptive`` multiplies it, for each
    micro-batch of all ranks, by the ratio of the gradients of L1 + LPIPS and of the GAN at the decoder's last layer
    (VQGAN).
    """

    l1_weight: NonNegativeFloat = 1.0
    l2_weight: NonNegativeFloat = 0.0
    perceptual: Literal["vgg", "alex", "random", "none"] = "vgg"
    perceptual_weight: NonNegativeFloat = 1.0
    adversarial: Literal["constant", "adaptive"] = "constant"
    adversarial_weight: NonNegativeFloat = 0.1
    adversarial_start: NonNegativeInt = 0
    quantization_weight: NonNegativeFloat = 1.0
    entropy_weight: NonNegativeFloat = 0.05
    lecam_weight: NonNegativeFloat = 0.05
    lecam_decay: Probability = 0.999


class OptimizerConfig(Section):
    """Adam or AdamW. `weight_decay_end` makes the decay follow a cosine from `weight_decay` to it."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Probability, Probability] = (0.5, 0.9)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    weight_decay_end: NonNegativeFloat | None = None
    grad_clip: NonNegativeFloat = 0.0


class ScheduleConfig(Section):
    """Learning rate as a factor of the optimizer's lr, by samples seen (never by epochs of a loader).

    Warm-up from `warmup_factor` over `warmup_samples`, then either ``steps`` (× `decay_factor` at each of
    `decay_at`) or ``linear`` (constant for `constant_fraction` of the rest, then linearly to `final_factor`).
    """

    kind: Literal["steps", "linear"] = "steps"
    warmup_samples: NonNegativeInt = 0
    warmup_factor: NonNegativeFloat = 0.005
    decay_at: tuple[PositiveInt, ...] = ()
    decay_factor: NonNegativeFloat = 0.1
    constant_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    final_factor: NonNegativeFloat = 0.1


class TrainConfig(Section):
    """Length, batch and rhythm. The gradient accumulation is derived: global / (micro · world size).

    Give the length as `samples` (images seen) or as `steps` (optimizer steps), not both.
    `keep_checkpoints`: the newest ones; `keep_every`: those of every so many steps for good, 0 for none; `keep_best`:
    the one with the lowest value of a logged metric (``l1``; the highest with a minus before it, ``-usage``).
    `check_hashes`: whether every file of the checkpoint that a run goes on from is read and hashed first.
    `mirror`: a folder or ``s3://`` prefix of this run's own that checkpoints are copied to in the background, newest
    first, that keeps by the same rules, and that a run directory without one begins from.
    `skipped_steps`: steps with a loss or gradient that is not finite, each skipped on all ranks and logged, that any
    1,000 steps may have before the run stops.
    `hang_timeout`: seconds without progress after which a run ends itself and names the ranks that did not arrive;
    below the 30 minutes after which torch ends a collective without such words.
    `grace`: seconds after a signal (SIGTERM, SIGUSR1, Ctrl-C) by which the run has saved and left; what is not done
    then is left undone, and the newest whole checkpoint stands. Somewhat less than the cluster waits before it kills
    (``--signal=USR1@300``; KillWait or a partition's GraceTime for SIGTERM).
    `deterministic`: use GPU kernels with a fixed order of summation: the same bits from the same ranks, but slower, and
    an error where torch has no such kernel. On CPUs nothing changes.
    `profile`: first and last step of a trace in RUN/profile, with a snapshot of GPU memory, on `profile_ranks`.
    """

    samples: PositiveInt | None = None
    steps: PositiveInt | None = None
    global_batch: PositiveInt = 256
    micro_batch: PositiveInt = 4
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 50
    checkpoint_every: PositiveInt = 5000
    keep_checkpoints: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    keep_best: str | None = None
    check_hashes: bool = True
    mirror: str | None = None
    skipped_steps: NonNegativeInt = 10
    hang_timeout: Annotated[float, Field(gt=0, lt=1800)] = 1200.0
    grace: Annotated[float, Field(gt=0)] = 270.0
    deterministic: bool = False
    profile: tuple[PositiveInt, PositiveInt] | None = None
    profile_ranks: tuple[NonNegativeInt, ...] = (0,)

    @model_validator(mode="after")
    def _steps_in_order(self) -> TrainConfig:
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile: the first step ({self.profile[0]}) comes after the last ({self.profile[1]})")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.samples is None) == (self.steps is None):
            raise ValueError("give the run's length as exactly one of train.samples and train.steps")
        if self.samples is not None and self.samples < self.global_batch:
            raise ValueError(f"samples ({self.samples}) is less than one global_batch ({self.global_batch})")
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.samples is not None
        return self.samples // self.global_batch

    @property
    def total_samples(self) -> int:
        return self.total_steps * self.global_batch


class DeepSpeedConfig(Section):
    """`config`: a name in deepspeed_configs/ (``zero2``) or a path to a JSON file; `overrides` go on top.
    One rank in fp32 runs without ZeRO, since there is nothing to share, unless states are offloaded.

    Batch sizes, precision, clipping and optimizer are derived from the run and may not stand in either.
    """

    config: str = "zero1"
    overrides: dict[str, Any] = Field(default_factory=dict)


class WandbConfig(Section):
    """Weights & Biases beside metrics.jsonl. ``offline`` writes RUN/wandb, which ``wandb sync`` sends later, and so
    does ``online`` where there is no network at the start. A resumed run goes on under the same id.

    `group`: what runs are gathered by.
    """

    mode: Literal["off", "offline", "online"] = "off"
    project: str = "ibq-scale"
    entity: str | None = None
    group: str | None = None


class RunConfig(Section):
    """What both stages share. `out` is the run directory.

    `tensorboard`: whether its events are written to RUN/tensorboard too.
    `init`: a model of the same sizes (an import, an export, a checkpoint, a run) whose weights a new run starts from.
    """

    name: str
    out: str | None = None
    init: str | None = None
    data: DataConfig = DataConfig()
    train: TrainConfig
    schedule: ScheduleConfig = ScheduleConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = False
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def run_dir(self) -> str:
        return self.out or f"runs/{self.name}"


class ValidationConfig(Section):
    """Measures on samples that training does not see, of the averaged weights (the live ones without an average).

    `data`: prepared images for a tokenizer, code shards for a transformer; null for none. `every`: steps from one to
    the next, and at the end. `samples`: how many, the same ones each time.
    """

    data: str | None = None
    every: PositiveInt = 1000
    samples: PositiveInt = 5000


class TokenizerValidationConfig(ValidationConfig):
    """PSNR, SSIM, usage and perplexity of centre crops, and `metrics` that need weights: null takes those of LPIPS
    (VGG) and rFID whose files are cached on every node at the start; one that is named and absent ends the start.
    """

    metrics: tuple[Literal["lpips", "lpips_alex", "rfid"], ...] | None = None


class ARValidationConfig(ValidationConfig):
    """The mean loss, and where the run knows its tokenizer a grid of samples: the same places and numbers each time.

    `images`: how many, of evenly spaced classes; 0 for none. `guidance`, `temperature`: null takes what was published
    for the model's size, else 1.
    """

    images: NonNegativeInt = 16
    guidance: Annotated[float, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None


class TokenizerRun(RunConfig):
    """Stage 1: the image tokenizer. `codebook_group`: ranks that share one codebook; 0 for all of them, or for as many
    as divide the codebook.
    """

    task: Literal["tokenizer"] = "tokenizer"
    model: AutoencoderConfig = AutoencoderConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    loss: TokenizerLossConfig = TokenizerLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: TokenizerValidationConfig = TokenizerValidationConfig()
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    codebook_group: NonNegativeInt = 0


class ARRun(RunConfig):
    """Stage 2: the class-conditional transformer on code shards.

    `tokenizer`: a tokenizer checkpoint or export whose hash the code shards must carry, and which decodes the samples
    of a validation; ``null`` takes the codes' own word.
    """

    task: Literal["ar"] = "ar"
    model: TransformerConfig = TransformerConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.05, grad_clip=1.0)
    tokenizer: str | None = None
    validation: ARValidationConfig = ARValidationConfig()


AnyRun = TokenizerRun | ARRun
