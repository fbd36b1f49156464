"""Held-out loss of raster, random and annealed orders at equal steps: the table of docs/experiments.md.

``python -m tests.tools.orders CODES HELD_OUT --to results.json`` trains a small transformer in this process for each
order and seed, and goes on after a stop. FLOPs are equal, since an order adds only look-ups.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from ibq_scale.config.layers import resolve
from ibq_scale.config.run import ARRun
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.sets import open_sets
from ibq_scale.data.stream import code_stream, evaluation_codes
from ibq_scale.models.optimizers import adamw
from ibq_scale.models.order import Orders, draw_orders
from ibq_scale.models.transformer import Transformer
from ibq_scale.train.determinism import seed_by_position
from ibq_scale.train.schedule import lr_factor, random_order_share

ORDERS = ("raster", "random", "annealed")
MODEL = ("model.depth=3", "model.heads=2", "model.width=64", "model.conditioning=prefix")


def run_of(codes: str, order: str, seed: int, steps: int) -> ARRun:
    """The preset ``ar/demo``, narrower, on these codes."""
    info = load_manifest(codes, "codes").codes
    assert info is not None
    sizes = [f"model.codebook_size={info.codebook_size}", f"model.tokens={info.grid[0] * info.grid[1]}"]
    words = [f"data.train={codes}", f"train.steps={steps}", f"train.seed={seed}", f"model.order={order}"]
    run = resolve("ar/demo", [*words, *sizes, *MODEL, "model.classes=1000"]).config
    assert isinstance(run, ARRun)
    return run


def train(run: ARRun) -> Transformer:
    """In plain torch on this process, one micro-batch a step."""
    model, size = Transformer(run.model, run.train.seed).train(), run.train.global_batch
    optimizer = adamw(model, run.optimizer)
    stream = code_stream(
        open_sets(run.data, "codes"), seed=run.train.seed, rank=0, world_size=1, micro_batch=size, start=0
    )
    for step in range(run.train.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = run.optimizer.lr * lr_factor(run.schedule, step * size, run.train.total_samples)
        batch = next(stream)
        seed_by_position(run.train.seed, batch.requests)
        positions = batch.requests[:, 0].tolist()
        shares = [random_order_share(run, position) for position in positions]
        orders = None
        if run.model.order != "raster":
            orders = draw_orders(run.train.seed, positions, shares, run.model.tokens)
        optimizer.zero_grad()
        model.losses(batch.codes, batch.labels, orders=orders).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.grad_clip)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def held_out(model: Transformer, codes: str, run: ARRun, samples: int) -> float:
    """Mean cross-entropy of a code in raster order, in nats, with the embedding as at the run's end."""
    sets = open_sets(run.data.model_copy(update={"train": codes}), "codes")
    losses = []
    for batch, weights in evaluation_codes(sets, rank=0, world_size=1, batch=64, limit=samples):
        orders = None
        if model.order_emb is not None:
            raster = torch.arange(run.model.tokens).expand(len(batch.codes), -1)
            orders = Orders(raster, torch.full((len(raster),), random_order_share(run, run.train.total_samples)))
        losses.append(model.losses(batch.codes, batch.labels, orders=orders)[weights > 0].mean(dim=1))
    return float(torch.cat(losses).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codes")
    parser.add_argument("held_out")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[400])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, float] = json.loads(args.to.read_text()) if args.to.is_file() else {}
    for steps in args.steps:
        for seed in args.seeds:
            for order in ORDERS:
                name = f"{order} {steps} {seed}"
                if name not in found:
                    begin, run = time.process_time(), run_of(args.codes, order, seed, steps)
                    found[name] = held_out(train(run), args.held_out, run, 2000)
                    args.to.write_text(json.dumps(found, indent=1) + "\n")
                    print(f"{name}: {found[name]:.4f} ({time.process_time() - begin:.0f} CPU s)", flush=True)
        print("\n| order | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean |")
        for order in ORDERS:
            values = [found[f"{order} {steps} {seed}"] for seed in args.seeds]
            print(f"| {order} | " + " | ".join(f"{v:.3f}" for v in values) + f" | {statistics.mean(values):.3f} |")


if __name__ == "__main__":
    main()
