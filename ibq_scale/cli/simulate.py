"""``ibq-scale scale simulate``: a run on more than one machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ibq_scale.cli.options import at_least_one, finite
from ibq_scale.console import gigabytes
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.config.run import AnyRun, TokenizerRun
    from ibq_scale.scaling.devices import Device
    from ibq_scale.scaling.fabric import Fabric
    from ibq_scale.scaling.simulate import CodebookRow, Row


def add_command(leaves: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the leaf to the family."""
    parser = leaves.add_parser(
        "simulate",
        help="strong and weak scaling to 1,024 GPUs, and a codebook sharded or replicated",
        description="Of a transformer: images/s by ZeRO stage on ever more GPUs. Of a tokenizer: the codebook of 2^14 "
        "to 2^22 codes, replicated or over groups of ranks. From volumes and link speeds; nothing is measured.",
        epilog="example: ibq-scale scale simulate ar/7b --device h100 --gpus 8 --net 50",
    )
    parser.add_argument("source", metavar="PRESET_OR_YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--device", "--gpu", required=True, metavar="GPU", help="as of 'ibq-scale plan'")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="a node, where tables begin (default 8)")
    parser.add_argument("--most", type=int, default=1024, metavar="N", help="where they end (default 1024)")
    parser.add_argument("--link", type=finite, metavar="GB/S", help="of a GPU within its node, one direction")
    parser.add_argument(
        "--net", type=finite, metavar="GB/S", help="of a GPU to other nodes, one direction (default 50)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_simulate)


def _simulate(args: argparse.Namespace) -> int:
    from ibq_scale.config.layers import resolve
    from ibq_scale.config.run import TokenizerRun
    from ibq_scale.scaling.auto import settle
    from ibq_scale.scaling.devices import DEVICES, named
    from ibq_scale.scaling.plan import Machine
    from ibq_scale.scaling.profile import read_profile

    at_least_one(args, "gpus", "most")
    for name in ("link", "net"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be above 0 GB/s, got {value}")
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
    from ibq_scale.scaling.simulate import PAYS, ends, refused_stages, transformer_rows

    rows = transformer_rows(run, device, fabric, args.most)
    if args.json:
        stops = [{"mode": mode, "stage": stage, "gpus": gpus} for mode, stage, gpus in ends(rows)]
        print(json.dumps({"rows": [asdict(row) for row in rows], "pays_up_to": stops}, indent=2))
        return 0
    _head(run, device, fabric)
    heads = ("GPUs", "micro × acc", "passes", "optimizer", "exchange", "images/s", "efficiency", "memory")
    for mode, stage, gpus in ends(rows):
        print(f"\n{mode} scaling, ZeRO-{stage}")
        print("".join(f"{head:>12}" for head in heads))
        for row in rows:
            if (row.mode, row.stage) == (mode, stage):
                print(_row(row))
        print(f"  pays up to {gpus:,} GPUs" if gpus else "  does not fit")
    for stage, reason in refused_stages(run).items():
        print(f"\nno ZeRO-{stage}: {reason}")
    print(f"\na doubling pays off from {PAYS} times the images/s")
    return 0


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
    if args.json:
        best_of_each = [asdict(row) for row in best_groups(rows)]
        print(json.dumps({"rows": [asdict(row) for row in rows], "best": best_of_each}, indent=2))
        return 0
    _head(run, device, fabric)
    micro = run.train.micro_batch
    print(f"codes of {run.quantizer.dim}, micro-batch {micro}; the rest of the run: {gigabytes(taken)}")
    print(f"\n{'K':>10}{'GPUs':>8}{'products':>12}{'replicated':>22}{'over all':>22}{'best group':>22}")
    best = {(row.codes, row.gpus): row for row in best_groups(rows)}
    for (codes, gpus), quickest in best.items():
        whole, shared = (
            next(r for r in rows if (r.codes, r.gpus, r.group) == (codes, gpus, group)) for group in (1, gpus)
        )
        cells = [_cell(whole), _cell(shared), f"{quickest.group}: {_cell(quickest)}"]
        print(f"{codes:>10,}{gpus:>8,}{1000 * whole.products:>9,.1f} ms" + "".join(f"{cell:>22}" for cell in cells))
    print("\nexchange and optimizer of a step of one micro-batch, beside the products; memory; !: does not fit")
    return 0


def _cell(row: CodebookRow) -> str:
    return f"{1000 * (row.exchange + row.optimizer):,.1f} ms {gigabytes(row.bytes)}" + ("" if row.fits else " !")


def _head(run: AnyRun, device: Device, fabric: Fabric) -> None:
    from ibq_scale.scaling.roofline import BASIS

    print(
        f"{run.name} on {device.name}, {fabric.node} a node: {gigabytes(fabric.link)}/s within it, "
        f"{gigabytes(fabric.net)}/s a GPU between nodes"
    )
    print(BASIS)
