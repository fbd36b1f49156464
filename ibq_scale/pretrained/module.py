"""Models with ``from_pretrained`` and ``save_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import nn

from ibq_scale.errors import UserError
from ibq_scale.pretrained.hub import address_of


class Pretrained(nn.Module):
    """A module with its weights in a folder, as users of the Hub know it."""

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None, device: torch.device | str = "cpu") -> Self:
        """Loads a model in eval mode: a folder, checkpoint or run, or OWNER/NAME on the Hub. UserError as loaders."""
        from ibq_scale.pretrained.loading import load_model

        model = load_model(address_of(path, revision))
        if not isinstance(model, cls):
            raise UserError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model with its card to a new folder, for `from_pretrained` and ``checkpoint push``."""
        from ibq_scale.pretrained.exporting import save_model
        from ibq_scale.pretrained.loading import ARModel, Tokenizer, refuse_overwrite

        refuse_overwrite(Path(folder))
        assert isinstance(self, Tokenizer | ARModel)
        # The weights may have changed since it was computed.
        self.__dict__.pop("hash", None)
        save_model(Path(folder), self, {})
