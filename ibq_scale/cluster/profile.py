"""A cluster's settings, from ~/.config/ibq-scale/clusters.yaml or the file in $IBQ_SCALE_CLUSTERS.

default: alps
profiles:
  alps: {partition: gpu, account: my-project, gpu: h100, gpus_per_node: 8, setup: [module load cuda/12.8]}
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from ibq_scale.config.base import Section
from ibq_scale.config.layers import explain
from ibq_scale.config.models import PositiveInt
from ibq_scale.config.secrets import refuse_secrets
from ibq_scale.documents import DocumentError, parse_yaml, read_text
from ibq_scale.errors import UserError

PATH_VARIABLE = "IBQ_SCALE_CLUSTERS"
Line = Annotated[str, Field(pattern=r"^[^\n]+$")]


class Profile(Section):
    """One cluster. None keeps the value of the sbatch file.

    `gpu`: as for ``ibq-scale plan --device``. `gpus_per_node`: 0 for nodes without GPUs. A node then runs
    `ntasks_per_node` ranks, otherwise one per GPU. `setup`: first shell lines (modules). `env`: variables of the job.
    `sbatch`: more options of sbatch (``--reservation=x``). For containers, `srun`: options of srun, `inside`: words
    before the command. `ibq_scale`: path of the command on the nodes (default: the path of the submitting command).
    """

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    time: Line | None = None
    mem: Line | None = None
    gpu: Line | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    ntasks_per_node: PositiveInt | None = None
    cpus_per_task: PositiveInt | None = None
    sbatch: tuple[Line, ...] = ()
    setup: tuple[Line, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    srun: tuple[Line, ...] = ()
    inside: tuple[Line, ...] = ()
    ibq_scale: Line | None = None


def load_profile(name: str | None) -> tuple[str | None, Profile]:
    """The profile of this name or the default one, with its name. An empty profile without a file.

    UserError for an unreadable file, an unknown key (with the nearest valid one), or an unknown name.
    """
    path = Path(os.environ.get(PATH_VARIABLE) or Path.home() / ".config/ibq-scale/clusters.yaml")
    if not path.is_file():
        if name is not None or os.environ.get(PATH_VARIABLE):
            raise UserError(f"{path} does not exist: write there  profiles: {{{name or 'NAME'}: {{partition: …}}}}")
        return None, Profile()
    try:
        # As texts, since YAML reads 24:00:00 as a number of seconds.
        values = parse_yaml(read_text(path), texts=True) or {}
    except (OSError, DocumentError) as e:
        raise UserError(f"cannot read {path}: {' '.join(str(e).split())}") from None
    profiles = values.get("profiles") if isinstance(values, dict) else None
    if not isinstance(profiles, dict) or not set(values) <= {"default", "profiles"}:
        raise UserError(f"{path}: expected 'profiles: {{NAME: {{partition: …}}}}' and, if you like, 'default: NAME'")
    chosen = name or values.get("default")
    if chosen is None:
        return None, Profile()
    if chosen not in profiles:
        near = difflib.get_close_matches(str(chosen), map(str, profiles), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(map(str, profiles))}"
        raise UserError(f"{path} has no profile '{chosen}': {hint}")
    try:
        profile = Profile.model_validate(profiles[chosen] or {})
    except ValidationError as e:
        raise UserError(explain(e.errors()[0], Profile, f"{path}, {chosen}")) from None
    refuse_secrets(profile.env, profile.setup, f"{path}, {chosen}")
    return str(chosen), profile
