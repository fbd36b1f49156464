"""Profiles of clusters: found, chosen, and refused with the right word where one is misspelt."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibq_scale.cluster.profile import Profile, load_profile
from ibq_scale.errors import UserError

FILE = """
default: alps
profiles:
  alps: {partition: gpu, gpus_per_node: 4, gpu: h100}
  here: {gpus_per_node: 0, ntasks_per_node: 2}
"""


def test_the_default_and_another_by_name(profiles: Path) -> None:
    profiles.write_text(FILE)
    assert load_profile(None) == ("alps", Profile(partition="gpu", gpus_per_node=4, gpu="h100"))
    assert load_profile("here") == ("here", Profile(gpus_per_node=0, ntasks_per_node=2))


def test_the_variable_names_another_file(profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiles.write_text(FILE)
    (tmp_path / "mine.yaml").write_text("profiles: {x: {partition: mine}}")
    monkeypatch.setenv("IBQ_SCALE_CLUSTERS", str(tmp_path / "mine.yaml"))
    assert load_profile(None) == (None, Profile()), "no default: nothing is taken unasked"
    assert load_profile("x")[1].partition == "mine"


def test_the_documented_example(profiles: Path) -> None:
    usage = Path(__file__).parents[2] / "docs" / "usage.md"
    (example,) = [block.split("```")[0] for block in usage.read_text().split("```yaml\n")[1:] if "\nprofiles:" in block]
    profiles.write_text(example)
    name, profile = load_profile(None)
    assert (name, profile.time, profile.gpus_per_node) == ("alps", "24:00:00", 8), "YAML's own 24:00:00 is 86400"
    assert profile.env == {"NCCL_IB_HCA": "mlx5"}


def test_nothing_is_written_down(profiles: Path) -> None:
    assert load_profile(None) == (None, Profile())
    with pytest.raises(UserError, match="does not exist: write there"):
        load_profile("alps")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("profiles: {alps: {partitoin: gpu}}\ndefault: alps", "unknown key 'partitoin', did you mean 'partition'"),
        ("profiles: {alps: {gpus_per_node: many}}\ndefault: alps", "gpus_per_node"),
        ("profiles: {alps: {}}\ndefault: alp", "no profile 'alp': did you mean 'alps'"),
        ("alps: {partition: gpu}", "expected 'profiles"),
        ("profiles: [", "cannot read"),
    ],
)
def test_what_is_wrong_is_said(profiles: Path, text: str, said: str) -> None:
    profiles.write_text(text)
    with pytest.raises(UserError, match=said):
        load_profile(None)
