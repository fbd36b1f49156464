"""Keeps secrets out of configs, batch scripts, run directories and reports, since others can read them.

Secrets belong in the environment or in the files of the AWS, W&B and Hugging Face tools. No message here repeats one.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from ibq_scale.errors import UserError
from ibq_scale.names import expand_home

# Matches WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, DB_PASSWORD, MYPASS, APIKEY. Not BYPASS, not PKEY.
SECRET_NAME = re.compile(
    r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|CREDENTIALS?)(?:_|$)"
    r"|(?:API_?KEY|ACCESS_?KEY|SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|(?<!BY)PASS)$",
    re.IGNORECASE,
)
# Also inside a list, as in export=ALL,NAME=value.
ASSIGNMENT = re.compile(r"\b([A-Za-z_][A-Za-z0-9_]*)=([\"']?)([^\s\"';,]+)")
BEARER = re.compile(r"\bBearer\s+([\"']?)([^\s\"']+)", re.IGNORECASE)


def is_secret(variable: str, value: str) -> bool:
    """Whether this looks like a secret in plain text. ``$NAME`` and ``$(cat file)`` do not."""
    return bool(SECRET_NAME.search(variable)) and bool(value) and not value.lstrip("\"'").startswith(("$", "`"))


def refuse_secrets(variables: Mapping[str, str], lines: tuple[str, ...], where: str) -> None:
    """UserError if one of `variables`, or an assignment in a shell line, holds a secret."""
    set_by_lines = [(found[1], found[3]) for line in lines for found in ASSIGNMENT.finditer(line)]
    set_by_lines += [("Authorization_token", found[2]) for line in lines for found in BEARER.finditer(line)]
    for name, value in [*variables.items(), *set_by_lines]:
        if is_secret(name, value):
            raise UserError(
                f"{where}: {name} is a secret, and batch scripts are kept in the run directory, where others can read "
                f"them. Export it in the submitting shell (Slurm passes it on), or read it in the job: {name}=$(cat …)"
            )


def refuse_credentials(url: str) -> None:
    """UserError if an address holds a user or a password."""
    scheme, separator, rest = url.partition("://")
    head = rest.partition("/")[0]
    # A secret key may contain a slash.
    if separator and ("@" in head or (":" in head and "@" in rest)):
        raise UserError(
            f"{scheme}://…@{rest.rpartition('@')[2]}: an address holds no credentials, since it is written into "
            f"configs and logs. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or AWS_PROFILE"
        )


def masked(text: str) -> str:
    """Text of `notify` for files that others can read: addresses without their paths, which may be secrets."""
    text = re.sub(r"(https?://[^/\s\"']+)/[^\s\"']*", r"\1/…", text)
    text = BEARER.sub("Bearer …", text)
    return ASSIGNMENT.sub(lambda found: f"{found[1]}=…" if is_secret(found[1], found[3]) else found[0], text)


def without_credentials(url: str) -> str:
    """The address of a server, without user and password."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def wandb_host() -> str:
    """Host of the W&B server: from WANDB_BASE_URL, or the public one."""
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""


def has_wandb_login(host: str) -> bool:
    """Whether W&B finds a key for this host, in WANDB_API_KEY or in the netrc file of 'wandb login'."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        # As for W&B, an entry for every host (`default`) counts too.
        return netrc.netrc(expand_home(os.environ.get("NETRC", "~/.netrc"))).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError, UserError):
        return False
