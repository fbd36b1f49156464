"""Exported models on the Hugging Face Hub or a compatible server (HF_ENDPOINT). Needs ``ibq-scale[hub]``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ibq_scale.documents import one_line
from ibq_scale.errors import UserError

PREFIX = "hf://"
FILES = ("config.json", "*.safetensors", "README.md")


def address_of(path: str | Path, revision: str | None = None) -> str | Path:
    """OWNER/NAME without such a folder here → its ``hf://`` address, at `revision` if given. Else `path` itself."""
    name = str(path)
    if not name.startswith(PREFIX):
        if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return path
        name = PREFIX + name
    return name if revision is None else f"{name}@{revision}"


def local(path: str | Path) -> Path:
    """`path`, or the files of ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``, fetched to the Hub's own cache.

    UserError if the library, the model or the network is missing.
    """
    if not (isinstance(path, str) and path.startswith(PREFIX)):
        return Path(path)
    repo, _, revision = path.removeprefix(PREFIX).partition("@")
    hub = _library()
    try:
        return Path(hub.snapshot_download(repo, revision=revision or None, allow_patterns=list(FILES)))
    except Exception as e:
        raise UserError(f"cannot fetch {path}: {one_line(e)}") from None


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads an exported model to OWNER/NAME, created if absent, and returns its address for loading.

    UserError if `folder` is no exported model, or the Hub refuses.
    """
    absent = [name for name in ("config.json", "model.safetensors", "README.md") if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{folder} is no exported model (no {', '.join(absent)}): make one with 'ibq-scale checkpoint export'"
        )
    hub = _library()
    try:
        api = hub.HfApi()
        # None means the owner's default.
        api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(FILES))
    except Exception as e:
        raise UserError(f"cannot push to {repo}: {one_line(e)}") from None
    return f"{PREFIX}{repo}"


def _library() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise UserError("models on the Hub need huggingface_hub: pip install 'ibq-scale[hub]'") from None
    return huggingface_hub
