"""The tokenizer with the feature loss: the decoder predicts features of a frozen encoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig
from ibq_scale.models.autoencoder import TokenizerModel
from ibq_scale.quantize.collectives import WHOLE, Shards
from ibq_scale.quantize.quantized import Quantized


class Alignment(nn.Module):
    """Projects the decoder's features before its first upsampling, and compares them by cosine.

    These features come after the quantizer, so the codes must carry the target: VFMTok (arXiv 2507.08441) reconstructs
    it from quantized tokens, GigaTok (arXiv 2504.08736) aligns an early layer of its decoder through an MLP. The MLP
    has three layers as in REPA (arXiv 2410.06940). `middle`: the decoder's blocks before its levels.
    """

    def __init__(self, middle: nn.Module, config: AutoencoderConfig, features: int) -> None:
        super().__init__()
        width = config.channels * config.channel_multipliers[-1]
        layers: list[nn.Module] = [nn.Conv2d(width, 4 * width, 1), nn.SiLU()]
        layers += [nn.Conv2d(4 * width, 4 * width, 1), nn.SiLU(), nn.Conv2d(4 * width, features, 1)]
        self.projection = nn.Sequential(*layers)
        self._tap_BChw: Tensor | None = None
        middle.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._tap_BChw = output

    def forward(self, target_BWhw: Tensor) -> Tensor:
        """1 − the mean cosine with the last decoder call's projected features, a scalar, fp32."""
        tap_BChw, self._tap_BChw = self._tap_BChw, None
        assert tap_BChw is not None, "the decoder has not run yet"
        return 1.0 - F.cosine_similarity(self.projection(tap_BChw).float(), target_BWhw.float(), dim=1).mean()


class AlignedTokenizer(TokenizerModel):
    """A tokenizer with an `Alignment`. It trains in the generator's engine, and no exported model has it."""

    def __init__(self, model: AutoencoderConfig, quantizer: QuantizerConfig, features: int) -> None:
        super().__init__(model, quantizer)
        self.alignment = Alignment(self.autoencoder.decoder.mid, model, features)

    def forward(  # type: ignore[override]
        self,
        x_BCHW: Tensor,
        rows_KD: Tensor,
        shards: Shards = WHOLE,
        mean_K: Tensor | None = None,
        age_K: Tensor | None = None,
        target_BWhw: Tensor | None = None,
    ) -> tuple[Tensor, Quantized, Tensor]:
        """As `TokenizerModel`, and the `Alignment` with the target features of h × w tokens."""
        return *super().forward(x_BCHW, rows_KD, shards, mean_K, age_K), self.alignment(target_BWhw)
