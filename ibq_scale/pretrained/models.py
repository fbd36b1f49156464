"""Models for inference: the tokenizer with its codebook, and the transformer with its samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig, TransformerConfig
from ibq_scale.data.manifest import ConditionInfo
from ibq_scale.errors import UserError
from ibq_scale.models.autoencoder import Autoencoder, image_of, tokens_of
from ibq_scale.models.condition import Condition
from ibq_scale.models.sampling import GuidanceSchedule, SamplingSettings, generate
from ibq_scale.models.transformer import Transformer
from ibq_scale.pretrained.hub import address_of
from ibq_scale.pretrained.text import encoder_of
from ibq_scale.quantize.quantizer import encode, lookup


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
        from ibq_scale.pretrained.loading import refuse_overwrite

        refuse_overwrite(Path(folder))
        assert isinstance(self, Tokenizer | ARModel)
        # The weights may have changed since it was computed.
        self.__dict__.pop("hash", None)
        save_model(Path(folder), self, {})


class Tokenizer(Pretrained):
    """Images to codes and back. `codebook_KD` is a buffer, fp32. Calling it reconstructs images."""

    def __init__(self, model: AutoencoderConfig, quantizer: QuantizerConfig) -> None:
        super().__init__()
        self.model_config = model
        self.quantizer_config = quantizer
        self.autoencoder = Autoencoder(model, quantizer.dim)
        self.codes_of: tuple[str, ...] = ()
        """Hashes of the tokenizers whose encoder and codebook it has, besides its own."""
        self.codebook_KD: Tensor
        self.register_buffer("codebook_KD", torch.zeros(quantizer.codebook_size, quantizer.dim))
        self.eval().requires_grad_(False)

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return self.model_config.downsampling

    def encode(self, images: Tensor) -> Tensor:
        """Float images (B, 3, H, W) in [-1, 1] → codes int64 (B, h, w).

        H and W are multiples of the downsampling. ValueError for other sizes and shapes.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        b, _, height, width = images.shape
        if height % self.downsampling or width % self.downsampling or not height or not width:
            raise ValueError(f"image sides {height} × {width} must be multiples of {self.downsampling}")
        z_ND = tokens_of(self.autoencoder.encode(images.to(self.codebook_KD.device)))
        codes_N = encode(z_ND, self.codebook_KD, self.quantizer_config)
        return codes_N.view(b, height // self.downsampling, width // self.downsampling)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 (B, h, w) of any h and w → float images (B, 3, H, W), about [-1, 1] and not clamped.

        Raises ValueError for other shapes.
        """
        if codes.ndim != 3:
            raise ValueError(f"codes must be (B, h, w), got {tuple(codes.shape)}")
        b, h, w = codes.shape
        flat = codes.to(self.codebook_KD.device).flatten()
        codes_ND = lookup(flat, self.codebook_KD, settings=self.quantizer_config)
        z_BDhw = image_of(codes_ND, torch.Size((b, self.codebook_KD.shape[1], h, w)))
        return self.autoencoder.decode(z_BDhw).float()

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))

    forward = reconstruct

    def has_codes_of(self, hash_: str) -> bool:
        """Whether the tokenizer of this hash gives the same codes: itself, or one whose decoder alone was tuned."""
        return hash_ in (self.hash, *self.codes_of)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the sizes and all weights, the stamp of code shards."""
        digest = hashlib.sha256()
        # Settings of the computation do not belong to the model's identity.
        model = self.model_config.model_dump(mode="json", exclude={"activation_checkpointing", "compile"})
        settings = self.quantizer_config
        sizes = [model, settings.kind, *(["l2_normalize"] if settings.l2_normalize else [])]
        digest.update(json.dumps(sizes, sort_keys=True).encode())
        _add_weights(digest, self)
        return digest.hexdigest()


class ARModel(Pretrained):
    """The transformer for inference: logits and samples."""

    def __init__(self, config: TransformerConfig, tokenizer: str | None, encoder: ConditionInfo | None = None) -> None:
        super().__init__()
        self.transformer = Transformer(config)
        self.config = config
        self.tokenizer_hash = tokenizer
        """Hash of the tokenizer of its training codes, if known."""
        self.encoder = encoder
        """What made the vectors of its training, of a model with ``conditioning=embedding``."""
        self.path = ""
        """Directory of the model."""
        self.eval().requires_grad_(False)

    @property
    def hash(self) -> str:
        """sha256 (hex) of the architecture and all current weights."""
        digest = hashlib.sha256(json.dumps(self.config.stored(), sort_keys=True).encode())
        _add_weights(digest, self)
        return digest.hexdigest()

    def forward(self, codes: Tensor, labels: Tensor, condition: Condition | Sequence[str] | None = None) -> Tensor:
        """Codes int64 (B, T), labels int64 (B,) → logits (B, T, V). ``logits[:, t]`` is for code t.

        `condition`: as for `generate`.
        """
        logits: Tensor = self.transformer(codes, labels, self._condition(condition))
        return logits

    def generate(
        self,
        labels: Tensor,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        seed: int = 0,
        ids: Tensor | None = None,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: float = 1.0,
        condition: Condition | Sequence[str] | None = None,
    ) -> Tensor:
        """Codes int64 (B, T) in raster order. See `models.sampling.Sampler`.

        `condition`: of a model with ``conditioning=embedding``, captions for its text encoder, or vectors (B, L, C)
        with their lengths (B,). Labels then only enter the random numbers. UserError for a class-conditional model.
        """
        schedule = (guidance_schedule, guidance_power)
        settings = SamplingSettings(guidance, temperature, top_k, top_p, greedy, seed, *schedule)
        return generate(self.transformer, labels, settings, ids, self._condition(condition))

    def encode(self, captions: Sequence[str]) -> Condition:
        """Captions as the model's text encoder gives them. UserError without one."""
        if self.encoder is None:
            raise UserError("the model knows no text encoder: give vectors, or train on codes of 'tokenize --captions'")
        return encoder_of(self.encoder).condition(captions)

    def _condition(self, given: Condition | Sequence[str] | None) -> Condition | None:
        if given is None:
            return None
        if self.config.conditioning != "embedding":
            raise UserError(f"the model is conditional on classes ({self.config.conditioning}), not on a condition")
        condition = given if isinstance(given, Condition) else self.encode(given)
        sizes = (self.config.condition_tokens, self.config.condition_width)
        if condition.vectors_BLC.shape[1:] != sizes:
            raise UserError(
                f"a condition of vectors {tuple(condition.vectors_BLC.shape)} instead of (B, {sizes[0]}, {sizes[1]})"
            )
        return condition.to(self.transformer.head.weight.device)


def _add_weights(digest: hashlib._Hash, model: nn.Module) -> None:
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
