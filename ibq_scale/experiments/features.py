"""Features of a frozen encoder, for the stability bench: it measures codebooks alone.

The encoder is the preset's. It is trained here with its decoder and without a quantizer, so the features describe
pictures and suit none of the quantizers more than another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_scale.config.run import TokenizerRun
from ibq_scale.data.sets import open_sets
from ibq_scale.data.stream import image_stream, to_float
from ibq_scale.models.autoencoder import Autoencoder, tokens_of
from ibq_scale.models.optimizers import adam

ENCODER_SEED = 0


def frozen_features(run: TokenizerRun, tokens: int) -> Tensor:
    """Features (tokens, D) of `run.data`, fp32, centred, with root mean square 1.

    The encoder has had `run.train.total_steps` steps of Adam on the mean absolute error of its decoder's pictures.
    """
    torch.manual_seed(ENCODER_SEED)
    model = Autoencoder(run.model, run.quantizer.dim)
    optimizer = adam(model.parameters(), run.optimizer)
    batches = image_stream(
        open_sets(run.data, "images"),
        resolution=run.model.resolution,
        seed=ENCODER_SEED,
        rank=0,
        world_size=1,
        micro_batch=run.train.micro_batch,
        start=0,
    )
    for _ in range(run.train.total_steps):
        images = to_float(next(batches).images_u8)
        torch.autograd.backward(F.l1_loss(model.decode(model.encode(images)), images))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found: list[Tensor] = []
    with torch.no_grad():
        while sum(map(len, found)) < tokens:
            found.append(tokens_of(model.encode(to_float(next(batches).images_u8))))
    features_TD = torch.cat(found)[:tokens]
    features_TD -= features_TD.mean(dim=0)
    # One factor for all dimensions: the shape of the cloud stays.
    features_TD /= features_TD.square().mean().sqrt()
    return features_TD


def in_dimensions(features_TD: Tensor, dim: int) -> Tensor:
    """Features (T, dim) of variance 1 each: the first principal components. Unchanged if they have `dim` already.

    LFQ and FSQ have few dimensions, and their levels are made for values around 1.
    """
    if features_TD.shape[1] == dim:
        return features_TD
    covariance_DD = features_TD.T.double() @ features_TD.double() / len(features_TD)
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    # Ascending: the largest come last.
    largest = values_D.argsort(descending=True)[:dim]
    whitening_DE: Tensor = vectors_DD[:, largest] / values_D[largest].sqrt()
    return (features_TD @ whitening_DE.float()).contiguous()
