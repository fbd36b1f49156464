"""Config of a run: data, losses, length, parallel layout, logging.

A YAML file describes a `TokenizerRun` or an `ARRun`. The trainer reads no other settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from ibq_scale import extensions
from ibq_scale.config import aspects
from ibq_scale.config.base import AUTO, OPEN, Section, auto_int
from ibq_scale.config.models import (
    AutoencoderConfig,
    DiscriminatorConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    QuantizerConfig,
    TransformerConfig,
)
from ibq_scale.config.optimizer import ARScheduleConfig, OptimizerConfig, ScheduleConfig, TokenizerOptimizerConfig
from ibq_scale.config.secrets import masked

if TYPE_CHECKING:
    AutoPositive = int
    AutoNonNegative = int
else:
    AutoPositive, AutoNonNegative = auto_int(1), auto_int(0)


Aspects = Annotated[tuple[str, ...], AfterValidator(aspects.parsed)]


class DataConfig(Section):
    """Sources of samples and their order."""

    train: str | tuple[str, ...] = Field(
        "???", description="A folder or `s3://bucket/prefix` with a `manifest.json`, or several: `[a, b]`."
    )
    weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="Share of each source in the stream, by position (rounded to 1/4096). Without weights the "
        "sources form one data set, and every sample occurs once an epoch.",
    )
    cache_dir: str | None = Field(
        "auto",
        description="Local folder for downloaded shards. Workers then hold no S3 client. `auto`: a folder in "
        "SLURM_TMPDIR or TMPDIR for `s3://` sources, none for folders. null: one request per sample.",
    )
    cache_bytes: PositiveInt = Field(50 * 10**9, description="Largest size of the cache, in bytes.")
    workers: AutoNonNegative = Field(
        OPEN,
        description="Processes that load and decode samples, per rank. 0: the rank itself. `auto`: as many as the step "
        "needs by the plan, at least 1, within the rank's CPUs.",
    )
    order: Literal[1, 2] | None = Field(
        None, description="Version of the order of samples (data/order.py). null: the checkpoint's, else the newest."
    )
    lanes: PositiveInt | None = Field(
        None,
        description="Shuffle: places of the data set that are read side by side. null: the checkpoint's, else as many "
        "as keep the shards in use within half of `cache_bytes`.",
    )
    window: PositiveInt | None = Field(
        None,
        description="Shuffle: shards of mean size within which the rows of a lane are shuffled. null: as for `lanes`.",
    )
    augment: Literal["random_crop", "center_crop"] = Field(
        "random_crop", description="Random or centre crop of the training images."
    )
    flip: bool = Field(False, description="Mirror half of the images.")
    aspects: Aspects = Field(
        (),
        description="For a tokenizer, width:height of the training crops, as the data was prepared (`prepare images "
        "--aspects`): `[3:4, 1:1, 4:3]`. Each step has one aspect, and crops of at most `model.resolution`² pixels. "
        "Without: square crops of any data.",
    )
    bad_samples: NonNegativeInt = Field(
        100, description="Damaged samples before the run stops. Each one is logged and replaced by a neighbour."
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """`train` as a tuple."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @model_validator(mode="after")
    def _weights_fit(self) -> DataConfig:
        if self.weights and self.aspects:
            raise ValueError("weights and aspects are both shares of the stream: give one of them")
        if not self.sources or (self.weights and len(self.weights) != len(self.sources)):
            raise ValueError(f"weights: {len(self.weights)} of them for {len(self.sources)} sources: one each, or none")
        return self


class TokenizerLossConfig(Section):
    """Weights of the tokenizer's loss terms.

    Published: 1·L1 + 1·LPIPS(VGG) + 0.1·GAN + 1·quantization + 0.05·entropy.
    """

    l1_weight: NonNegativeFloat = Field(1.0, description="Weight of the mean absolute error of the pixels.")
    l2_weight: NonNegativeFloat = Field(0.0, description="Weight of the mean squared error of the pixels.")
    perceptual: Literal["vgg", "alex", "random", "none"] = Field(
        "vgg", description="Backbone of LPIPS. `random`: seeded random weights, for dry runs."
    )
    perceptual_weight: NonNegativeFloat = Field(1.0, description="Weight of LPIPS.")
    features: Literal["none", "dinov2", "random", "tiny"] = Field(
        "none",
        description="Frozen encoder whose features the decoder's first level predicts, by cosine (VFMTok, GigaTok). "
        "`dinov2`: ViT-S/14, from `ibq-scale fetch-weights dinov2`. `random`: seeded random weights of the same sizes, "
        "for dry runs. `tiny`: random and of 4 narrow blocks, for tests.",
    )
    feature_weight: NonNegativeFloat = Field(1.0, description="Weight of 1 − cosine of `features`.")
    adversarial: Literal["constant", "adaptive"] = Field(
        "constant",
        description="`constant`: `adversarial_weight` as it is (published). `adaptive`: times the ratio of two "
        "gradients at the decoder's last layer, of L1 + LPIPS and of the GAN, for each micro-batch over all ranks "
        "(VQGAN).",
    )
    adversarial_weight: NonNegativeFloat = Field(0.1, description="Weight of the generator's loss.")
    adversarial_start: NonNegativeInt = Field(
        0, description="Samples seen before the discriminator trains and its loss counts."
    )
    quantization_weight: NonNegativeFloat = Field(1.0, description="Weight of the quantization loss.")
    entropy_weight: NonNegativeFloat = Field(0.05, description="Weight of the entropy loss.")
    lecam_weight: NonNegativeFloat = Field(
        0.05, description="Weight of LeCAM's penalty in the discriminator's loss (arXiv 2104.03310)."
    )
    lecam_decay: Probability = Field(0.999, description="Decay of LeCAM's averages of the logits, per step.")


TRACKERS = ("mlflow", "trackio")
DashboardName = Annotated[
    str, AfterValidator(lambda name: extensions.check_name(extensions.DASHBOARDS, name, TRACKERS))
]

# One value stands for a list of it.
OneOrMore = BeforeValidator(lambda v: () if v in (None, "", "null") else (v,) if isinstance(v, str) else v)


def _step_range(text: str) -> str:
    first, colon, end = text.partition(":")
    if not (first.isdecimal() and (end.isdecimal() or not colon)) or not 0 < int(first) < int(end or int(first) + 1):
        raise ValueError(f"'{text}' is no range of steps: write FIRST:END, without the step END, as in 100:110")
    return text


StepRange = Annotated[str, AfterValidator(_step_range)]


class TrainConfig(Section):
    """Length, batch, checkpoints and guards. Gradient accumulation is derived: global / (micro × world size).

    Give the length as `samples` or as `steps`, not both.
    """

    samples: PositiveInt | None = Field(None, description="Length in images seen.")
    steps: PositiveInt | None = Field(None, description="Length in optimizer steps.")
    global_batch: PositiveInt = Field(256, description="Images in an optimizer step, over all ranks.")
    micro_batch: AutoPositive = Field(
        OPEN,
        description="Images in one forward pass of a rank. `auto`: the largest number that fits the GPU's memory and "
        "divides the rank's share of the global batch.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="Precision of weights and activations. `bf16` keeps fp32 master weights."
    )
    seed: NonNegativeInt = Field(
        0, description="Seed of the initial weights, of the order of samples and of all randomness."
    )
    log_every: PositiveInt = Field(50, description="Steps between two lines of metrics.jsonl.")
    checkpoint_every: PositiveInt = Field(5000, description="Steps between two checkpoints.")
    keep_checkpoints: PositiveInt = Field(2, description="Number of newest checkpoints to keep.")
    keep_every: NonNegativeInt = Field(
        0, description="Keep the checkpoints at multiples of this many steps for good. 0: none."
    )
    keep_best: str | None = Field(
        None,
        description="Keep the checkpoint with the lowest value of this logged metric (`l1`). A leading minus "
        "means the highest (`-usage`).",
    )
    check_hashes: bool = Field(True, description="Read and hash every file of the checkpoint before resuming from it.")
    mirror: str | None = Field(
        None,
        description="A folder or `s3://` prefix of this run alone. Checkpoints are copied there in the "
        "background, newest first, and kept by the same rules. A run directory without a checkpoint resumes from "
        "it.",
    )
    skipped_steps: NonNegativeInt = Field(
        10,
        description="Skipped steps within any 1,000 before the run stops. A step with a loss or gradient that "
        "is not finite is skipped on all ranks and logged.",
    )
    skip_spikes: NonNegativeFloat | None = Field(
        0.0,
        description="Skip a step on all ranks if its loss or gradient norm is above the last 128 steps' median by more "
        "than this many standard deviations (estimated as 1.4826 × the median deviation). The first 16 steps are "
        "never skipped. It counts as one of `skipped_steps`. 0 or null: off.",
    )
    skip_steps: Annotated[tuple[StepRange, ...], OneOrMore] = Field(
        (),
        description="Steps whose samples are passed over, as Python ranges: `[100:110]` has the steps 100 to 109. The "
        "numbers, rates and samples of the other steps stay.",
    )
    freeze: Annotated[tuple[Literal["encoder", "codebook", "decoder"], ...], OneOrMore] = Field(
        (),
        description="Parts of a tokenizer that keep the bits of `init`. `[encoder,codebook]` tunes the decoder alone, "
        "so codes and transformers of `init` stay valid.",
    )
    hang_timeout: Annotated[float, Field(gt=0, lt=1800)] = Field(
        1200.0,
        description="Seconds without progress before the run ends itself and names the missing ranks. Must be "
        "less than torch's 30 minutes for a collective, since its error names no rank.",
    )
    grace: Annotated[float, Field(gt=0)] = Field(
        270.0,
        description="Seconds from a signal (SIGTERM, SIGUSR1, Ctrl-C) to the exit. The run saves a checkpoint "
        "within them. If the save is not done by then, the run exits with the newest whole checkpoint. Choose "
        "somewhat less than the cluster's delay before it kills (`--signal=USR1@300`, KillWait or a partition's "
        "GraceTime).",
    )
    deterministic: bool = Field(
        False,
        description="Use GPU kernels with a fixed order of sums: the same ranks give the same bits. Slower, and an "
        "error for an operator without such a kernel. Nothing changes on CPUs.",
    )
    profile: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="First and last step of a torch trace in RUN/profile, with a snapshot of the GPU's memory."
    )
    profile_ranks: tuple[NonNegativeInt, ...] = Field((0,), description="Ranks that `profile` traces.")

    @model_validator(mode="after")
    def _steps_fit(self) -> TrainConfig:
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile: the first step ({self.profile[0]}) comes after the last ({self.profile[1]})")
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

    def skips(self, step: int) -> bool:
        """Whether `skip_steps` has this step."""
        parts = [text.partition(":") for text in self.skip_steps]
        return any(int(first) <= step < int(end or int(first) + 1) for first, _, end in parts)

    @property
    def total_samples(self) -> int:
        return self.total_steps * self.global_batch


class DeepSpeedConfig(Section):
    """DeepSpeed's own JSON. Batch sizes, precision, clipping and optimizer follow from the run and are refused here.

    One rank in fp32 without offloading runs without ZeRO, since there is nothing to share.
    """

    config: str = Field(
        AUTO,
        description="A name in deepspeed_configs/ (`zero2`) or a path to a JSON file. `auto`: the ZeRO stage with the "
        "shortest step that fits the GPU's memory.",
    )
    overrides: dict[str, Any] = Field(default_factory=dict, description="Values merged over the file's.")


class WandbConfig(Section):
    """Weights & Biases, in addition to metrics.jsonl. A resumed run continues under the same id."""

    mode: Literal["off", "offline", "online"] = Field(
        "off",
        description="`offline`: write RUN/wandb for a later `wandb sync`. `online` falls back to it without a "
        "network at the start.",
    )
    project: str = Field("ibq-scale", description="W&B project.")
    entity: str | None = Field(None, description="W&B user or team. null: the account's default.")
    group: str | None = Field(None, description="Group of the run in W&B.")


# A secret in it is written to no file.
Notified = Annotated[str, Field(min_length=1), PlainSerializer(masked, return_type=str, when_used="json")]


class MetricsConfig(Section):
    """The run's state for Prometheus, from rank 0 (docs/operators.md)."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="Serve OpenMetrics at http://HOST:PORT/metrics. A taken port costs a line, not the run."
    )
    host: str = Field(
        "127.0.0.1", description="Address of `port`. `0.0.0.0`: all networks of the node, without a password."
    )
    textfile: str | None = Field(
        None, description="Also write the metrics to this file, for node_exporter's textfile collector (`….prom`)."
    )


class RunConfig(Section):
    """Keys of both stages."""

    name: str = Field(description="Name of the run.")
    out: str | None = Field(None, description="The run directory. null: runs/NAME.")
    init: str | None = Field(
        None,
        description="A model of the same sizes (import, export, checkpoint or run). A new run starts from its weights.",
    )
    data: DataConfig = DataConfig()
    train: TrainConfig
    schedule: ScheduleConfig = ScheduleConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    wandb: WandbConfig = WandbConfig()
    notify: Annotated[tuple[Notified, ...], OneOrMore] = Field(
        (),
        description="Told of the end of each attempt (done, hang, requeue, failure): a shell command with the facts "
        "as JSON in its input, an `https://` address for a POST of them, `$NAME` for the one in an environment "
        "variable, or several: `[a, b]`. Config files keep no path of an address.",
    )
    metrics: MetricsConfig = MetricsConfig()
    tensorboard: bool = Field(False, description="Write TensorBoard events to RUN/tensorboard too.")
    dashboards: tuple[DashboardName, ...] = Field(
        (), description="Other dashboards: `mlflow`, `trackio`, an entry point or `module:class` (docs/extending.md)."
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Decay of the moving average of the weights, per step. 0: no average."
    )

    @property
    def run_dir(self) -> str:
        return self.out or f"runs/{self.name}"


class ValidationConfig(Section):
    """Metrics on samples outside the training set, of the averaged weights (the live ones without an average)."""

    data: str | None = Field(
        None, description="Prepared images for a tokenizer, code shards for a transformer. null: no validation."
    )
    every: PositiveInt = Field(1000, description="Steps between two validations. The last step always validates.")
    samples: PositiveInt = Field(5000, description="Number of samples, the same ones each time.")


class TokenizerValidationConfig(ValidationConfig):
    """PSNR, SSIM, usage and perplexity of centre crops, and `metrics`."""

    metrics: tuple[Literal["lpips", "lpips_alex", "rfid"], ...] | None = Field(
        None,
        description="Metrics with weights of their own. null: LPIPS (VGG) and rFID where their files are cached "
        "on every node at the start. A named metric without its file is an error at the start.",
    )


class ARValidationConfig(ValidationConfig):
    """The mean loss, and a grid of samples if the run knows its tokenizer.

    The grid has the same classes and random numbers each time.
    """

    images: NonNegativeInt = Field(16, description="Images in the grid, of evenly spaced classes. 0: none.")
    guidance: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Guidance of the samples. null: the published value for the model's size, else 1."
    )
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Temperature of the samples. null: the published value for the model's size, else 1."
    )


class TokenizerRun(RunConfig):
    """Stage 1: the image tokenizer."""

    task: Literal["tokenizer"] = "tokenizer"
    model: AutoencoderConfig = AutoencoderConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    loss: TokenizerLossConfig = TokenizerLossConfig()
    optimizer: TokenizerOptimizerConfig = TokenizerOptimizerConfig()
    validation: TokenizerValidationConfig = TokenizerValidationConfig()
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="Decay of the moving average of the weights, per step. 0: no average."
    )
    codebook_group: AutoNonNegative = Field(
        OPEN,
        description="Ranks that share one codebook. 0: all ranks, or as many as divide the codebook. `auto`: the "
        "number with the shortest exchange.",
    )

    @property
    def crop_sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height of the training crops, by `data.aspects`. Empty for squares."""
        return aspects.crop_sizes(self.data.aspects, self.model.resolution, self.model.downsampling)

    @model_validator(mode="after")
    def _some_of_it_trains(self) -> TokenizerRun:
        if len(set(self.train.freeze)) == 3:
            raise ValueError("train.freeze has encoder, codebook and decoder: nothing is left to train")
        if "codebook" in self.train.freeze and self.quantizer.revive_after:
            raise ValueError("train.freeze has the codebook: quantizer.revive_after would replace its codes")
        return self


class ARRun(RunConfig):
    """Stage 2: the class-conditional transformer on code shards."""

    task: Literal["ar"] = "ar"
    model: TransformerConfig = TransformerConfig()
    schedule: ARScheduleConfig = ARScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.05, grad_clip=1.0)
    tokenizer: str | None = Field(
        None,
        description="A tokenizer checkpoint or export. The code shards must carry its hash, and it decodes the "
        "samples of a validation. null: no check and no samples.",
    )
    validation: ARValidationConfig = ARValidationConfig()

    @model_validator(mode="after")
    def _no_keys_of_tokenizers(self) -> ARRun:
        if self.data.aspects:
            raise ValueError("data.aspects is for tokenizers: the codes of a transformer are of square crops")
        if self.train.freeze:
            raise ValueError("train.freeze is for tokenizers")
        return self


AnyRun = TokenizerRun | ARRun
