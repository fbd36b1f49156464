"""Secrets have no place in configs, addresses and batch scripts, and the refusal does not repeat them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibq_scale.cluster.profile import load_profile
from ibq_scale.config.layers import resolve
from ibq_scale.config.secrets import has_wandb_login, is_secret, wandb_host, without_credentials
from ibq_scale.data.store import open_store
from ibq_scale.errors import UserError

WORD = "wJalr/XUtnFEMI"


@pytest.mark.parametrize("key", ["data.train", "train.mirror", "validation.data", "init"])
def test_an_address_with_credentials_is_refused_without_repeating_them(key: str) -> None:
    with pytest.raises(UserError, match=r"s3://…@bucket/prefix: an address holds no credentials") as refused:
        resolve("ar/tiny", [f"{key}=s3://AKIAKEY:{WORD}@bucket/prefix"])
    assert WORD not in str(refused.value)
    assert "AKIAKEY" not in str(refused.value)


def test_also_in_a_list_and_for_commands_without_a_config() -> None:
    with pytest.raises(UserError, match="holds no credentials"):
        resolve("ar/tiny", [f"data.train=[s3://bucket/a,s3://k:{WORD}@bucket/b]"])
    with pytest.raises(UserError, match="holds no credentials"):
        open_store(f"s3://k:{WORD}@bucket/b")
    resolve("ar/tiny", ["data.train=s3://bucket/who@home"])


@pytest.mark.parametrize(
    "profile",
    [
        f"env: {{WANDB_API_KEY: {WORD}}}",
        f"env: {{HF_TOKEN: {WORD}}}",
        f"setup: [module load cuda, 'export AWS_SECRET_ACCESS_KEY={WORD}']",
        f"setup: ['DB_PASSWORD=\"{WORD}\" true']",
        f"setup: ['MYPASS={WORD}']",
        f"setup: ['export APIKEY={WORD}']",
        f"setup: ['curl -H \"Authorization: Bearer {WORD}\" there']",
        f"setup: ['srun --export=ALL,WANDB_API_KEY={WORD} true']",
    ],
)
def test_a_profile_with_a_secret_is_refused(profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clusters.yaml"
    path.write_text(f"default: alps\nprofiles:\n  alps: {{{profile}}}\n")
    monkeypatch.setenv("IBQ_SCALE_CLUSTERS", str(path))
    with pytest.raises(UserError, match="is a secret, and batch scripts are kept") as refused:
        load_profile(None)
    assert WORD not in str(refused.value)


def test_what_reads_a_secret_when_the_job_runs_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clusters.yaml"
    path.write_text(
        "default: alps\nprofiles:\n  alps:\n    env: {HF_TOKEN: $MY_TOKEN, TOKENIZERS_PARALLELISM: 'false'}\n"
        "    setup: ['export WANDB_API_KEY=$(cat ~/.wandb)', 'export NCCL_IB_PKEY=1']\n"
    )
    monkeypatch.setenv("IBQ_SCALE_CLUSTERS", str(path))
    assert load_profile(None)[0] == "alps"
    assert not is_secret("WANDB_API_KEY", "")
    assert not is_secret("NCCL_BYPASS", "1")


def test_a_server_is_told_without_its_user() -> None:
    assert without_credentials(f"http://me:{WORD}@store:9000/x") == "http://store:9000/x"
    assert without_credentials("http://store:9000") == "http://store:9000"
    assert without_credentials("") == ""


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("machine wandb.site.example login user password p\n", True),
        ("machine other.example login user password p\n", False),
        ("default login user password p\n", True),
        ("no netrc", False),
    ],
)
def test_a_login_of_wandb_is_looked_for_where_wandb_does(
    text: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.site.example/path")
    (tmp_path / "netrc").write_text(text)
    (tmp_path / "netrc").chmod(0o600)
    assert has_wandb_login(wandb_host()) is known
