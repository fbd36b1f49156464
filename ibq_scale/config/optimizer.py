"""Config of the optimizers and of their rates over a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from ibq_scale import extensions
from ibq_scale.config.base import Section
from ibq_scale.config.models import NonNegativeFloat, NonNegativeInt, PositiveInt, Probability

Share = Annotated[float, Field(ge=0, le=1)]

SCHEDULES = ("steps", "linear", "wsd", "cosine", "constant")
ScheduleName = Annotated[
    str,
    AfterValidator(lambda name: extensions.check_name(extensions.SCHEDULES, name, SCHEDULES)),
    WithJsonSchema({"anyOf": [{"enum": list(SCHEDULES)}, {"type": "string"}]}),
]


class ScheduleConfig(Section):
    """The learning rate as a factor on `optimizer.lr`, by samples seen (never by epochs of a loader)."""

    kind: ScheduleName = Field(
        "steps",
        description="`steps`: times `decay_factor` at each of `decay_at`. `linear`, also called `wsd`: constant for "
        "`constant_fraction` of the samples after the warm-up, then linear to `final_factor`. `cosine`: half a cosine "
        "to `final_factor` instead. `constant`: 1 after the warm-up. Other names are extensions (docs/extending.md).",
    )
    warmup_samples: NonNegativeInt = Field(0, description="Samples of the linear warm-up.")
    warmup_factor: NonNegativeFloat = Field(0.005, description="Factor at the start of the warm-up.")
    decay_at: tuple[PositiveInt, ...] = Field((), description="`steps`: samples after which the rate decays.")
    decay_factor: NonNegativeFloat = Field(0.1, description="`steps`: factor of each decay.")
    constant_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="`linear`: share of the samples after the warm-up with a constant rate."
    )
    final_factor: NonNegativeFloat = Field(0.1, description="`linear`: factor at the end of the run.")


class ARScheduleConfig(ScheduleConfig):
    """The learning rate as for a tokenizer, and the order of the codes (`model.order`)."""

    order_anneal_start: Share = Field(
        0.5,
        description="`model.order=annealed`: share of the run up to which every sample has a random order. RAR's is "
        "0.5, epoch 200 of 400.",
    )
    order_anneal_end: Share = Field(
        0.75,
        description="`model.order=annealed`: share of the run from which on every sample has the raster order. The "
        "probability of a random order falls linearly between the two. RAR's is 0.75, epoch 300 of 400.",
    )

    @model_validator(mode="after")
    def _anneals_forwards(self) -> ARScheduleConfig:
        if self.order_anneal_start > self.order_anneal_end:
            raise ValueError(
                f"order_anneal_start ({self.order_anneal_start}) comes after order_anneal_end ({self.order_anneal_end})"
            )
        return self


class OptimizerConfig(Section):
    """Adam for the tokenizer, AdamW or Muon for the transformer."""

    kind: Literal["adam", "muon"] = Field(
        "adam",
        description="`muon`: the transformer's attention and feed-forward matrices step by Muon (arXiv 2502.16982) "
        "with the same `lr` and `weight_decay`, everything else by AdamW. Not for tokenizers, ZeRO-3 or offloading.",
    )
    lr: Annotated[float, Field(gt=0)] = Field(1e-4, description="Learning rate before the schedule's factor.")
    betas: tuple[Probability, Probability] = Field((0.5, 0.9), description="Decay of Adam's two moments.")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's ε.")
    momentum: Probability = Field(0.95, description="Muon's momentum (Nesterov's).")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="AdamW's decay of matrices. Norms, biases and embeddings are not decayed."
    )
    weight_decay_end: NonNegativeFloat | None = Field(
        None, description="The decay follows a cosine from `weight_decay` to this value. null: constant."
    )
    grad_clip: NonNegativeFloat = Field(0.0, description="Largest norm of the gradient. 0: no clipping.")


class TokenizerOptimizerConfig(OptimizerConfig):
    """Adam, and the codebook's own rate."""

    codebook_lr: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Learning rate of the codebook, or of SimVQ's layer, before its schedule's factor. null: `lr`.",
    )
    codebook_schedule: ScheduleConfig | None = Field(
        None,
        description="Schedule of the codebook's rate: a section with the keys of `schedule`, for example "
        "`{kind: constant}`. null: the run's schedule.",
    )

    @field_validator("kind")
    @classmethod
    def _known_here(cls, kind: str) -> str:
        if kind == "muon":
            raise ValueError("Muon is for the transformer's matrices: a tokenizer's are convolutions, take adam")
        return kind
