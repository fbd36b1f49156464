"""Two engines, a codebook spread over ranks, any ZeRO stage: each step equals the plain one on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ibq_scale.config.layers import resolve
from ibq_scale.config.run import TokenizerRun
from ibq_scale.data.sets import DataSets
from ibq_scale.data.stream import ImageBatch
from ibq_scale.distributed.world import World
from ibq_scale.zero.master_weights import pieces, shapes
from tests.ranks import run_ranks
from tests.train.reference import PlainTokenizerTraining, gather, smooth_leaky_relu

STEPS, MICRO = 10, 2
# Two runs that differ in the last bit part visibly where a value lies between them and a kink. The discriminator's are
# smoothed in both; of L1's, images are drawn until the plain run stays this far from every one.
KINK_MARGIN = 5e-6


def _run(deepspeed: str, *overrides: str) -> TokenizerRun:
    """Adam's eps is large: its step is then smooth in the gradient, and a wrong gradient's size shows."""
    run = resolve(
        "tokenizer/tiny",
        [
            "data.train=none",
            "model.channel_multipliers=[1,1]",
            "model.resolution=16",
            "model.attention_resolutions=[8]",
            "model.z_channels=8",
            "quantizer.dim=8",
            "quantizer.codebook_size=32",
            "quantizer.entropy_temperature=1.0",
            f"train.micro_batch={MICRO}",
            "optimizer.lr=0.01",
            "optimizer.eps=0.01",
            f"deepspeed.config={deepspeed}",
            *overrides,
        ],
    ).config
    assert isinstance(run, TokenizerRun)
    return run


def _images(draw: int, step: int, count: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 * draw + step)
    return torch.randint(256, (count, 3, 16, 16), generator=g, dtype=torch.uint8)


def _train(
    rank: int, world_size: int, runs: dict[str, TokenizerRun], draws: dict[str, int]
) -> dict[str, dict[str, torch.Tensor]]:
    """Trains each run on its draw of images; returns rank 0's weights by name, the codebook put together."""
    from ibq_scale.train.tokenizer_task import TokenizerTask

    world = World(rank, world_size, rank, torch.device("cpu"))
    torch.nn.LeakyReLU.forward = smooth_leaky_relu
    results = {}
    for name, run in runs.items():
        task = TokenizerTask(run, world, DataSets((), run.data))
        for step in range(STEPS):
            task.set_rates(step * run.train.global_batch)
            images = _images(draws[name], step, run.train.global_batch)
            task.train_step(iter(_batches(images, rank, world_size)))
        rows = [torch.empty_like(task.codebook.rows.detach()) for _ in range(world_size)]
        dist.all_gather(rows, task.codebook.rows.detach())
        results[name] = (
            _weights(task.generator, world)
            | _weights(task.discriminator, world)
            | {f"ema.{k}": v for k, v in (gather(task.ema.pieces(), shapes(task.generator), world) or {}).items()}
            | {"codebook": torch.cat(rows[: task.codebook.group_size]), "ema_fake": task.lecam.fake.clone()}
        )
    return {name: {k: v.numpy() for k, v in tensors.items()} for name, tensors in results.items()}


def _weights(engine: Any, world: World) -> dict[str, torch.Tensor]:
    """The fp32 weights of all ranks on rank 0; where parameters are whole on each rank, they have to be the same."""
    whole = gather(pieces(engine, world), shapes(engine), world) or {}
    if engine.zero_optimization_stage() < 3:
        for name, value in whole.items():
            live = engine.module.get_parameter(name).detach()
            assert torch.equal(live, value.to(live.dtype)), name
    return whole


def _batches(images: torch.Tensor, rank: int, world_size: int) -> list[ImageBatch]:
    none = torch.zeros(MICRO, dtype=torch.int64)
    requests = torch.arange(len(images))[:, None].expand(-1, 5)
    return [
        ImageBatch(part, none, places)
        for part, places in list(zip(images.split(MICRO), requests.split(MICRO), strict=True))[rank::world_size]
    ]


def _plain(run: TokenizerRun, calls: int = 1) -> tuple[int, dict[str, torch.Tensor]]:
    """The first draw of images that keeps away from kinks, and the weights after training on it."""
    forward = torch.nn.LeakyReLU.forward
    torch.nn.LeakyReLU.forward = smooth_leaky_relu
    try:
        return _plain_smooth(run, calls)
    finally:
        torch.nn.LeakyReLU.forward = forward


def _plain_smooth(run: TokenizerRun, calls: int) -> tuple[int, dict[str, torch.Tensor]]:
    for draw in range(100):
        reference = PlainTokenizerTraining(run)
        for step in range(STEPS):
            images = _images(draw, step, run.train.global_batch).float().div(127.5).sub(1.0)
            reference.step(images, run.train.global_batch // MICRO, calls)
        if reference.kink_distance > KINK_MARGIN:
            return draw, (
                dict(reference.model.named_parameters())
                | {f"discriminator.{k}": v for k, v in reference.discriminator.named_parameters()}
                | {f"ema.{k}": v for k, v in reference.averages.items()}
                | {"codebook": reference.codebook_KD, "ema_fake": reference.lecam.fake}
            )
    raise AssertionError("no draw of images keeps away from kinks")


def _alignment(found: dict[str, Any], expected: dict[str, torch.Tensor], run: TokenizerRun) -> float:
    """Cosine of the directions in which all weights together have moved from their common start."""
    start = PlainTokenizerTraining(run)
    origin = dict(start.model.named_parameters()) | {"codebook": start.codebook_KD}
    moves = [
        torch.cat([(torch.as_tensor(after[k]).view_as(v) - v).flatten() for k, v in origin.items()]).detach()
        for after in (found, expected)
    ]
    return float(torch.nn.functional.cosine_similarity(moves[0], moves[1], dim=0))


def _assert_same(found: dict[str, Any], expected: dict[str, torch.Tensor], run: str) -> None:
    assert found.keys() == expected.keys(), run
    for name, value in expected.items():
        value = value.detach()
        got = torch.from_numpy(found[name]).view_as(value)
        torch.testing.assert_close(got, value, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{run}: {n}: {m}")


# By ranks: name of the DeepSpeed config, ranks of a codebook group (0: all). Four ranks add groups that are neither one
# rank nor all, and partitions that are not halves; test_elastic has offloading on four.
LAYOUTS = {
    2: [
        (config, group)
        for config in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
        for group in (0, 1)
    ],
    4: [("zero1", 2), ("zero3", 0)],
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_zero_stage_and_codebook_group_equals_plain_torch(world_size: int) -> None:
    """Generator by ZeRO 0 to 3 and offloaded, discriminator by DDP or ZeRO-1, codebook in one group or replicated."""
    runs = {
        f"{config}, group {group}": _run(config, "train.global_batch=8", f"codebook_group={group}")
        for config, group in LAYOUTS[world_size]
    }
    run = next(iter(runs.values()))
    draw, expected = _plain(run)
    moved = PlainTokenizerTraining(run)
    assert not torch.allclose(expected["codebook"], moved.codebook_KD, atol=1e-2), "nothing was trained"
    found = run_ranks(_train, world_size, runs, dict.fromkeys(runs, draw))[0]
    assert found.keys() == runs.keys()
    for name, weights in found.items():
        _assert_same(weights, expected, name)


@pytest.mark.slow
@pytest.mark.distributed
def test_local_entropy_and_vq_with_accumulation_too() -> None:
    runs = {
        "local entropy": _run("zero2", "train.global_batch=4", "quantizer.entropy_scope=local"),
        "vq": _run("zero2", "train.global_batch=8", "quantizer.kind=vq", "loss.l2_weight=0.5"),
        "lfq": _run("zero1", "train.global_batch=8", "quantizer.kind=lfq", "quantizer.dim=5"),
        "bf16": _run("zero2", "train.global_batch=4", "train.precision=bf16"),
        "bf16, zero3": _run("zero3", "train.global_batch=4", "train.precision=bf16"),
    }
    calls = {"local entropy": 2, "vq": 1, "lfq": 1, "bf16": 1, "bf16, zero3": 1}
    plain = {name: _plain(run, calls[name]) for name, run in runs.items()}
    found = run_ranks(_train, 2, runs, {name: draw for name, (draw, _) in plain.items()})[0]
    # bf16 keeps 8 bits and so chooses another of two near codes now and then: no equality, but the same direction.
    for name in ("bf16", "bf16, zero3"):
        assert _alignment(found.pop(name), plain[name][1], runs[name]) > 0.5
    for name, weights in found.items():
        _assert_same(weights, plain[name][1], name)


def _poison(rank: int, world_size: int, runs: dict[str, TokenizerRun]) -> dict[str, list[bool]]:
    """A step with NaN in rank 1's encoder, between two good ones: what was applied, and that it changed nothing."""
    from ibq_scale.train.tokenizer_task import TokenizerTask

    world = World(rank, world_size, rank, torch.device("cpu"))
    applied = {}
    for name, run in runs.items():
        task = TokenizerTask(run, world, DataSets((), run.data))
        bad = [False]
        conv: Any = task.generator.module.autoencoder.quant_conv
        conv.register_forward_hook(lambda _, __, out, bad=bad: out * (float("nan") if bad[0] else 1.0))
        steps = []
        for step in range(3):
            bad[0] = step == 1 and rank == 1
            task.set_rates(step * run.train.global_batch)
            before = _state(task, world)
            steps.append(task.train_step(iter(_batches(_images(0, step, run.train.global_batch), rank, world_size))))
            unchanged = all(torch.equal(value, before[key]) for key, value in _state(task, world).items())
            assert unchanged == (step == 1), (name, step)
        assert bool(steps[1].finite) == (rank == 0), name
        applied[name] = [step.applied for step in steps]
    return applied


def _state(task: Any, world: World) -> dict[str, torch.Tensor]:
    """All that a step changes, this rank's part."""
    tensors = {f"g.{f.name}": f.values for f in pieces(task.generator, world)}
    tensors |= {f"d.{f.name}": f.values for f in pieces(task.discriminator, world)}
    tensors |= {f"ema.{k}": v for k, v in task.ema.shadow.state_dict().items()}
    tensors |= {f"buffer.{k}": v for k, v in task.discriminator.module.named_buffers()}
    tensors |= {"codebook": task.codebook.rows, "ema_rows": task.codebook.ema_rows, "lecam": task.lecam.fake}
    moments = task.codebook.optimizer.state.get(task.codebook.rows, {})
    return {k: v.detach().clone() for k, v in (tensors | moments).items()}


@pytest.mark.slow
@pytest.mark.distributed
def test_nan_on_one_rank_is_applied_on_none_and_to_nothing() -> None:
    runs = {
        f"{config} {precision}, group {group}": _run(
            config, "train.global_batch=8", f"codebook_group={group}", f"train.precision={precision}"
        )
        for config, precision, group in [
            ("zero0", "fp32", 0),
            ("zero1", "fp32", 1),
            ("zero1", "bf16", 1),
            ("zero2", "bf16", 0),
            ("zero3", "fp32", 0),
            ("zero3", "bf16", 1),
            ("zero2_offload", "fp32", 0),
            ("zero3_offload", "bf16", 0),
        ]
    }
    expected = {name: [True, False, True] for name in runs}
    assert run_ranks(_poison, 2, runs) == [expected, expected]
