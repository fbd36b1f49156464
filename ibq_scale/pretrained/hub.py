"""Exported models on the Hugging Face Hub, or what speaks its protocol (HF_ENDPOINT); ``ibq-scale[hub]`` brings it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ibq_scale.errors import UserError

PREFIX = "hf://"
FILES = ("config.json", "*.safetensors", "README.md")


def fetch(address: str) -> Path:
    """``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION`` → its files in the Hub's own cache.

    UserError where the library, the model or the network is not there.
    """
    repo, _, revision = address.removeprefix(PREFIX).partition("@")
    hub = _library()
    try:
        return Path(hub.snapshot_download(repo, revision=revision or None, allow_patterns=list(FILES)))
    except Exception as e:
        raise UserError(f"cannot fetch {address}: {_line(e)}") from None


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads an exported model as OWNER/NAME, which it makes if need be; returns the address to load it from.

    UserError where `folder` is no exported model, or the Hub refuses.
    """
    absent = [name for name in ("config.json", "model.safetensors", "README.md") if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{folder} is no exported model (no {', '.join(absent)}): make one with 'ibq-scale checkpoint export'"
        )
    hub = _library()
    try:
        api = hub.HfApi()
        # None leaves it to what the owner has set.
        api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(FILES))
    except Exception as e:
        raise UserError(f"cannot push to {repo}: {_line(e)}") from None
    return f"{PREFIX}{repo}"


def _library() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise UserError("models on the Hub need huggingface_hub: pip install 'ibq-scale[hub]'") from None
    return huggingface_hub


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
