"""From captions to vectors beside the codes, and from captions to images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ibq_scale.cli.main import main
from ibq_scale.config.layers import resolve
from ibq_scale.config.models import TransformerConfig
from ibq_scale.config.run import ARRun, DataConfig
from ibq_scale.data.codes import read_code_shard
from ibq_scale.data.manifest import ConditionInfo, load_manifest
from ibq_scale.data.sets import open_sets
from ibq_scale.data.store import open_store
from ibq_scale.data.stream import code_stream
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.generate.codes import tokenize
from ibq_scale.generate.images import sample
from ibq_scale.models.condition import Condition
from ibq_scale.models.sampling import SamplingSettings
from ibq_scale.models.transformer import Transformer
from ibq_scale.pictures import to_uint8
from ibq_scale.pretrained.loading import load_tokenizer
from ibq_scale.pretrained.models import ARModel
from ibq_scale.pretrained.text import text_encoder
from tests.ranks import run_ranks

EMBEDDING = {"conditioning": "embedding", "condition_tokens": 2, "condition_width": 8}
TEXTS = {"apples": "green apples", "birds": "two birds fly", "cars": ""}


def _tokenize(rank: int, size: int, checkpoint: str, data: str, to: str, captions: str) -> int:
    world = World(rank, size, rank, torch.device("cpu"))
    how = {"captions": captions, "encoder": "hash:8", "caption_tokens": 2}
    return tokenize(checkpoint, data, to, world, batch=8, **how).reused_shards


def _grid(rank: int, size: int, tokenizer: str, codes: str) -> np.ndarray[Any, Any]:
    from ibq_scale.train.sample_grid import SampleGrid

    sizes = {"codebook_size": 64, "tokens": 64, "depth": 1, "heads": 2, "width": 32}
    words = [f"model.{key}={value}" for key, value in (sizes | EMBEDDING).items()]
    config = resolve("ar/tiny", [f"data.train={codes}", f"tokenizer={tokenizer}", "validation.images=3", *words]).config
    assert isinstance(config, ARRun)
    world = World(rank, size, rank, torch.device("cpu"))
    model = Transformer(config.model).eval()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return SampleGrid(config, world, open_sets(config.data, "codes")).draw(model, lambda: None).numpy()


@pytest.mark.slow
@pytest.mark.distributed
def test_captions_become_vectors_beside_the_codes(tokenizer_dir: Path, dataset: str, tmp_path: Path) -> None:
    captions, to = tmp_path / "captions.tsv", tmp_path / "codes"
    captions.write_text("".join(f"{name}\t{text}\n" for name, text in TEXTS.items()))
    arguments = (str(tokenizer_dir), dataset, str(to), str(captions))
    run_ranks(_tokenize, 2, *arguments)
    manifest = load_manifest(str(to), "codes")
    assert manifest.codes is not None
    assert manifest.codes.condition is not None
    assert manifest.codes.condition.model_dump(exclude={"captions"}) == {"encoder": "hash:8", "tokens": 2, "width": 8}
    expected = dict(zip(TEXTS, text_encoder("hash:8", 2).encode(list(TEXTS.values())), strict=True))
    stored = 0
    for info in manifest.shards:
        shard = read_code_shard(open_store(str(to)).read(info.name), info.name)
        assert shard.vectors is not None
        assert shard.spans is not None
        stored += len(shard.vectors)
        for label, (first, rows) in zip(shard.labels.tolist(), shard.spans.tolist(), strict=True):
            found = shard.vectors[first : first + rows]
            assert np.array_equal(found, expected[manifest.classes[label]].half())
    # Images of a shard share the vectors of equal captions.
    assert stored <= 4 * len(manifest.shards)

    sets = open_sets(DataConfig(train=str(to), workers=0), "codes")
    where = {"seed": 0, "rank": 0, "world_size": 1, "micro_batch": 6, "start": 0}
    batch = next(code_stream(sets, conditions=True, **where))
    condition = Condition.of(batch.vectors, batch.lengths)
    assert condition is not None
    assert (condition.vectors_BLC.shape, condition.vectors_BLC.dtype) == ((6, 2, 8), torch.float16)
    assert condition.lengths_B.tolist() == [len(expected[manifest.classes[n]]) for n in batch.labels.tolist()]
    assert not condition.vectors_BLC[~condition.visible()].any()
    assert next(code_stream(sets, **where)).vectors is None

    # The pictures of a validation are those of the first conditions, on any ranks.
    grids = [run_ranks(_grid, ranks, str(tokenizer_dir), str(to))[0] for ranks in (1, 2)]
    assert (grids[0].shape, bool((grids[0] == grids[1]).all())) == ((3, 66, 66), True)

    # Other captions are another set.
    shutil.copytree(to, tmp_path / "again")
    again = (*arguments[:2], str(tmp_path / "again"))
    assert run_ranks(_tokenize, 1, *again, str(captions)) == [len(manifest.shards)]
    assert run_ranks(_tokenize, 1, *again, "classes") == [0]


def _sample(rank: int, size: int, ar: ARModel, tokenizer: str, to: str) -> None:
    world = World(rank, size, rank, torch.device("cpu"))
    settings = SamplingSettings(guidance=2.0, top_k=32, seed=7)
    both = {"captions": ["two birds", "a car"]}
    sample(ar, load_tokenizer(tokenizer), [0, 1], 3, settings, Path(to), world, batch=4, **both)
    for classes, captions, said in (([0], [], "give captions"), ([2], ["a", "b"], "the model has classes 0 to 1")):
        with pytest.raises(UserError, match=said):
            sample(ar, load_tokenizer(tokenizer), classes, 3, settings, Path(to), world, batch=4, captions=captions)


@pytest.mark.slow
@pytest.mark.distributed
def test_images_follow_captions(tokenizer_dir: Path, ar_dir: Path, tmp_path: Path) -> None:
    sizes = {"codebook_size": 64, "tokens": 64, "depth": 2, "heads": 2, "width": 32}
    config = TransformerConfig(**sizes, conditioning="embedding", condition_tokens=3, condition_width=8)
    info = ConditionInfo(encoder="hash:8", tokens=3, width=8, captions="")
    tokenizer = load_tokenizer(tokenizer_dir)
    ar = ARModel(config, tokenizer.hash, info)
    for parameter in ar.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    run_ranks(_sample, 2, ar, str(tokenizer_dir), str(tmp_path))
    with np.load(tmp_path / "samples.npz") as content:
        images, labels = content["arr_0"], content["arr_1"]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    asked = {"guidance": 2.0, "top_k": 32, "seed": 7, "ids": torch.tensor([1])}
    codes = ar.generate(torch.tensor([1]), condition=["a car"], **asked)
    expected = to_uint8(tokenizer.decode(codes.view(1, 8, 8)))[0].permute(1, 2, 0)
    assert np.abs(images[4].astype(int) - expected.numpy().astype(int)).max() <= 1
    assert not torch.equal(codes, ar.generate(torch.tensor([1]), condition=["two birds"], **asked))


def test_captions_that_cannot_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("\n")
    for words, said in (
        (["--captions", str(tmp_path / "absent")], "give a text file with one caption a line"),
        (["--captions", str(tmp_path / "empty")], "holds no caption: write one a line"),
        (["--prompt", "a cat", "--classes", "0"], "give one"),
    ):
        assert main(["sample", "ar", "--tokenizer", "tok", "--to", str(tmp_path), *words]) == 2
        assert said in capsys.readouterr().err
