"""Stand-ins for the published networks: right layouts, random numbers. They test the loading, not the figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ibq_scale.evaluate.fid import INCEPTION


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Inception's file only."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    empty = torch.nn.Module.load_state_dict
    try:
        torch.nn.Module.load_state_dict = lambda self, *a, **k: None  # type: ignore[method-assign]
        torch.save({}, folder / "none.pth")
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(folder / "none.pth")
        )
    finally:
        torch.nn.Module.load_state_dict = empty  # type: ignore[method-assign]
    (folder / "none.pth").unlink()
    torch.save(network.state_dict(), folder / INCEPTION)
    return folder
