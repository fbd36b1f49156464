"""``ibq-scale scale simulate``: a run on more than one machine."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ibq_scale.cli.options import JSON, OVERRIDES, Commands, add_command, argument, real, show, whole
from ibq_scale.console import gigabytes
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.config.run import AnyRun, TokenizerRun
    from ibq_scale.scaling.devices import Device
    from ibq_scale.scaling.fabric import Fabric
    from ibq_scale.scaling.simulate import CodebookRow, Row


def add_to(family: Commands) -> None:
    """Adds the command to the family ``scale``."""
    add_command(
        family,
        "simulate",
        _simulate,
        argument("source", metavar="PRESET_OR_YAML"),
        OVERRIDES,
        argument("--device", "--gpu", required=True, metavar="GPU", help="as of 'ibq-scale plan'"),
        whole("--gpus", "a node, where tables begin", 8),
        whole("--most", "where they end", 1024),
        real("--link", "of a GPU within its node, one direction", above=0, metavar="GB/S"),
        real("--net", "of a GPU to other nodes, one direction (default 50)", above=0, metavar="GB/S"),
        JSON,
        about="strong and weak scaling to 1,024 GPUs, and a codebook sharded or replicated",
        details="Of a transformer: images/s by ZeRO stage on ever more GPUs. Of a tokenizer: the codebook of 2^14 "
        "to 2^22 codes, replicated or over groups of ranks. From volumes and link speeds; nothing is measured.",
        example="scale simulate ar/7b --device h100 --gpus 8 --net 50",
    )


def _simulate(args: argparse.Namespace) -> int:
    from ibq_scale.config.layers import resolve
    from ibq_scale.config.run import TokenizerRun
    from ibq_scale.scaling.auto import settle
    from ibq_scale.scaling.devices import DEVICES, named
    from ibq_scale.scaling.plan import Machine
    from ibq_scale.scaling.profile import read_profile

    device = named(args.device)
    if device is None:
        raise UserError(f"--device {args.device} is not in the table ({', '.join(DEVICES)})")
    link, net = (None if value is None else value * 1e9 for value in (args.link, args.net))
    machine = Machine(args.gpus, 1, args.device, net=net, profile=read_profile(args.device))
    fabric = machine.fabric
    assert fabric is not None
    fabric = replace(fabric, link=link or fabric.link)
    run, _ = settle(resolve(args.source, args.overrides).config, machine)
    if isinstance(run, TokenizerRun):
        return _codebook(run, device, fabric, args)
    return _transformer(run, device, fabric, args)


def _transformer(run: AnyRun, device: Device, fabric: Fabric, args: argparse.Namespace) -> int:
    from ibq_scale.scaling.simulate import PAYS, ends, transformer_rows

    rows = transformer_rows(run, device, fabric, args.most)
    stops = [{"mode": mode, "stage": stage, "gpus": gpus} for mode, stage, gpus in ends(rows)]

    def lines() -> Iterator[str]:
        yield from _head(run, device, fabric)
        heads = ("GPUs", "micro × acc", "passes", "optimizer", "exchange", "images/s", "efficiency", "memory")
        for mode, stage, gpus in ends(rows):
            yield f"\n{mode} scaling, ZeRO-{stage}"
            yield "".join(f"{head:>12}" for head in heads)
            yield from (_row(row) for row in rows if (row.mode, row.stage) == (mode, stage))
            yield f"  pays up to {gpus:,} GPUs" if gpus else "  does not fit"
        yield f"\na doubling pays off from {PAYS} times the images/s"

    return show(args, {"rows": rows, "pays_up_to": stops}, lines(), indent=2)


def _row(row: Row) -> str:
    ms = [f"{1000 * value:,.1f} ms" for value in (row.time.passes, row.time.optimizer, row.time.exposed)]
    memory = gigabytes(row.peak) + ("" if row.fits else " !")
    cells = [f"{row.gpus:,}", f"{row.micro_batch} × {row.accumulation}", *ms, f"{row.images_per_s:,.0f}"]
    return "".join(f"{cell:>12}" for cell in [*cells, f"{100 * row.efficiency:.0f} %", memory])


def _codebook(run: TokenizerRun, device: Device, fabric: Fabric, args: argparse.Namespace) -> int:
    from ibq_scale.scaling.fitting import other_bytes
    from ibq_scale.scaling.simulate import best_groups, codebook_rows

    taken = other_bytes(run, fabric.node)
    rows = codebook_rows(run, device, fabric, args.most, taken)
    best = best_groups(rows)

    def lines() -> Iterator[str]:
        yield from _head(run, device, fabric)
        micro = run.train.micro_batch
        yield f"codes of {run.quantizer.dim}, micro-batch {micro}; the rest of the run: {gigabytes(taken)}"
        yield f"\n{'K':>10}{'GPUs':>8}{'products':>12}{'replicated':>22}{'over all':>22}{'best group':>22}"
        of = {(row.codes, row.gpus, row.group): row for row in rows}
        for quickest in best:
            codes, gpus = quickest.codes, quickest.gpus
            whole, shared = (of[codes, gpus, group] for group in (1, gpus))
            cells = [_cell(whole), _cell(shared), f"{quickest.group}: {_cell(quickest)}"]
            yield f"{codes:>10,}{gpus:>8,}{1000 * whole.products:>9,.1f} ms" + "".join(f"{cell:>22}" for cell in cells)
        yield "\nexchange and optimizer of a step of one micro-batch, beside the products; memory; !: does not fit"

    return show(args, {"rows": rows, "best": best}, lines(), indent=2)


def _cell(row: CodebookRow) -> str:
    return f"{1000 * (row.exchange + row.optimizer):,.1f} ms {gigabytes(row.bytes)}" + ("" if row.fits else " !")


def _head(run: AnyRun, device: Device, fabric: Fabric) -> Iterator[str]:
    from ibq_scale.scaling.roofline import BASIS

    yield (
        f"{run.name} on {device.name}, {fabric.node} a node: {gigabytes(fabric.link)}/s within it, "
        f"{gigabytes(fabric.net)}/s a GPU between nodes"
    )
    yield BASIS
