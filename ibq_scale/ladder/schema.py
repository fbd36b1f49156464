"""The config of a ladder: one YAML file for the runs of all rungs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator

from ibq_scale.config.base import Section
from ibq_scale.config.layers import explain, load_omegaconf, without_environment
from ibq_scale.config.models import NonNegativeInt, PositiveInt
from ibq_scale.config.text import as_typed, as_written, override
from ibq_scale.documents import read_text
from ibq_scale.errors import UserError

LADDERS = Path(__file__).parent / "ladders"
PositiveFloat = Annotated[float, Field(gt=0)]
# In the URLs of codes, for the size of their codebook.
PLACE = "{codebook}"


class SizeConfig(Section):
    """One size of the transformer. None takes the preset's value. `preset`: instead of the ladder's."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+$")]
    preset: str | None = None
    depth: PositiveInt | None = None
    heads: PositiveInt | None = None
    width: PositiveInt | None = None
    overrides: tuple[str, ...] = ()


class CodesConfig(Section):
    """The training data. `codebooks`: sizes, each with its own code shards at the URLs with `{codebook}`."""

    train: str = "???"
    validation: str | None = None
    codebooks: tuple[PositiveInt, ...] = (16384,)

    @model_validator(mode="after")
    def _each_has_a_place(self) -> CodesConfig:
        for url in (self.train, self.validation):
            if len(self.codebooks) > 1 and url not in (None, "???") and PLACE not in str(url):
                raise ValueError(f"{url}: several codebooks need {PLACE} in it, for the size of each")
        return self


class TilesConfig(Section):
    """Codes to make first, for ladders of minutes: of 16×16 tiles of photographs, by a tokenizer trained on them.

    `pictures`: a folder of photographs. null takes the ten from scikit-image and scikit-learn.
    """

    pictures: str | None = None
    tokenizer: str = "tokenizer/experiment"
    overrides: tuple[str, ...] = ()


MOST_RUNGS = 1000


class BudgetConfig(Section):
    """Lengths of the rungs: every size with each of `samples` (images), or with each of `flops` (of the whole training,
    so larger sizes see less). Default: each size's preset.
    """

    samples: tuple[PositiveInt, ...] = ()
    flops: tuple[PositiveFloat, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> BudgetConfig:
        if self.samples and self.flops:
            raise ValueError("give budgets as samples or as flops, not as both")
        return self


class RateConfig(Section):
    """Learning rates. ``constant``: each preset's, or `lr`. ``width``: lr · base_width / width, the rule of µP for the
    matrices of hidden layers under Adam (arXiv 2203.03466, table 8), here for all parameters.
    """

    rule: Literal["constant", "width"] = "constant"
    lr: PositiveFloat | None = None
    base_width: PositiveInt | None = None

    @model_validator(mode="after")
    def _width_has_a_base(self) -> RateConfig:
        if self.rule == "width" and (self.lr is None or self.base_width is None):
            raise ValueError("rule=width needs lr and base_width, the width of this lr")
        return self


class MachineConfig(Section):
    """The machine of the plan. `ranks`: of a local run (null: one a GPU, else 1). `mfu`: the assumed share of
    the peak.
    """

    device: str | None = None
    gpus: PositiveInt = 1
    nodes: PositiveInt = 1
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.45
    ranks: PositiveInt | None = None


class LadderConfig(Section):
    """Sizes × budgets × codebooks × seeds. `overrides`: ``key=value`` for every rung. A size's own come after them.

    `warmup`: share of each rung's samples, null for the preset's value.
    """

    name: str
    out: str | None = None
    preset: str
    overrides: tuple[str, ...] = ()
    sizes: Annotated[tuple[SizeConfig, ...], Field(min_length=1)]
    budget: BudgetConfig = BudgetConfig()
    codes: CodesConfig = CodesConfig()
    tiles: TilesConfig | None = None
    rate: RateConfig = RateConfig()
    warmup: Annotated[float, Field(ge=0, lt=1)] | None = None
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    machine: MachineConfig = MachineConfig()

    @model_validator(mode="after")
    def _can_be_counted(self) -> LadderConfig:
        budgets = len(self.budget.samples or self.budget.flops) or 1
        rungs = len(self.sizes) * budgets * len(self.codes.codebooks) * len(self.seeds)
        if not 1 <= rungs <= MOST_RUNGS:
            raise ValueError(
                f"sizes × budgets × codebooks × seeds are {rungs:,} rungs: 1 to {MOST_RUNGS:,} make a ladder"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> LadderConfig:
        names = [size.name for size in self.sizes]
        if len(set(names)) < len(names):
            raise ValueError(f"sizes must have names of their own, got {', '.join(names)}")
        for values in (self.budget.samples, self.budget.flops, self.codes.codebooks, self.seeds):
            if len(set(values)) < len(values):
                raise ValueError(f"two rungs would be the same: {values!s:.100} has a value twice")
        return self

    @property
    def folder(self) -> Path:
        """The folder of rungs, results and report."""
        return Path(self.out or f"runs/{self.name}")


def ladder_names() -> list[str]:
    return sorted(path.stem for path in LADDERS.glob("*.yaml"))


def load_ladder(source: str, overrides: Sequence[str] = ()) -> LadderConfig:
    """A ladder of the package, or a YAML file, with ``key=value`` on top.

    UserError for an unknown name, unreadable YAML, a misspelt key (with the nearest right one) or a wrong value.
    """
    path = _find(source)
    try:
        text = read_text(path)
        with without_environment():
            values: Any = OmegaConf.to_container(load_omegaconf(text))
            if isinstance(values, dict):
                values = as_typed(values, as_written(text), LadderConfig)
            above = [override(item, LadderConfig) for item in overrides]
            values = OmegaConf.to_container(OmegaConf.merge(values, *above), resolve=True)
    except (OSError, yaml.YAMLError, OmegaConfBaseException, ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"cannot read {source}: {' '.join(str(e).split())}") from None
    try:
        return LadderConfig.model_validate(values)
    except ValidationError as e:
        raise UserError("\n".join(explain(error, LadderConfig, source) for error in e.errors())) from None


def _find(source: str) -> Path:
    if source in ladder_names():
        return LADDERS / f"{source}.yaml"
    if source.endswith((".yaml", ".yml")):
        if not Path(source).is_file():
            raise UserError(f"ladder file {source} not found")
        return Path(source)
    near = difflib.get_close_matches(source, ladder_names(), n=1, cutoff=0.3)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"no ladder named '{source}': {hint}There are {', '.join(ladder_names())}; or give a .yaml file")
