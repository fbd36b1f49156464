"""``ibq-scale bench``: repeatable measurements."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from ibq_scale.cli.options import add_ranks, at_least_one, finite
from ibq_scale.console import gigabytes, tell
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.bench.ar import ARReport
    from ibq_scale.bench.kernels import Row
    from ibq_scale.bench.quantizer import Measured, QuantizerReport
    from ibq_scale.bench.sampling import SamplingReport
    from ibq_scale.bench.steps import StepReport
    from ibq_scale.bench.tokenizer import TokenizerReport
    from ibq_scale.config.run import AnyRun

Word = TypeVar("Word", bound=str)


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the family to the command line."""
    family = commands.add_parser("bench", help="measure this machine").add_subparsers(
        title="what", metavar="WHAT", required=True
    )
    parser = family.add_parser(
        "quantizer",
        help="step time and memory beside the dense form and bare matrix products",
        description="Time the IBQ quantizer's training step and encoding; several sizes make a table over each.",
        epilog="example: ibq-scale bench quantizer --tokens 1024 --codes 262144 --dim 256",
    )
    parser.add_argument("--tokens", default="1024", metavar="N[,N…]", help="tokens of a micro-batch (default 1024)")
    parser.add_argument("--codes", default="16384", metavar="K[,K…]", help="codebook sizes (default 16384)")
    parser.add_argument("--dim", type=int, default=256, metavar="D", help="code dimension (default 256)")
    parser.add_argument("--backend", choices=("auto", "tiled", "triton", "cublas"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="bf16", help="products on a GPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measured turns (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_quantizer)
    _add_kernels(family)
    data = family.add_parser(
        "data",
        help="images/s of the stream beside plain webdataset",
        description="Read a prepared data set of images as training does, and as plain webdataset does, by turns.",
        epilog="example: ibq-scale bench data s3://bucket/imagenet --cache /local/cache --workers 4",
    )
    data.add_argument("url", metavar="URL", nargs="?")
    data.add_argument(
        "--simulate",
        metavar="N-shards,B-bytes,S-samples",
        help="no data: what each of --nodes would keep and download of such a set, --batch samples at a time",
    )
    data.add_argument("--nodes", type=int, default=1, metavar="N", help="for --simulate (default 1)")
    data.add_argument("--cache-bytes", type=finite, default=50e9, metavar="B", help="for --simulate (default 50e9)")
    data.add_argument("--resolution", type=int, default=256, metavar="PIXELS", help="default 256")
    data.add_argument("--workers", type=int, default=1, metavar="N", help="decoding processes (default 1; 0: none)")
    data.add_argument("--batch", type=int, default=64, metavar="N", help="default 64")
    data.add_argument("--seconds", type=finite, default=5.0, metavar="S", help="a turn's length (default 5)")
    data.add_argument(
        "--cache",
        default="auto",
        metavar="DIR",
        help="local folder for shards, as data.cache_dir (default auto; none: a request for each sample)",
    )
    data.add_argument("--json", action="store_true", help="print one JSON document")
    data.set_defaults(run=_data)
    checkpoint = family.add_parser(
        "checkpoint",
        help="how long a save stops training, and how fast it is written",
        description="Save a state of noise as training does, beside a bare write to the same disk.",
        epilog="example: ibq-scale bench checkpoint /shared/runs --megabytes 1024 --ranks 2",
    )
    checkpoint.add_argument("folder", type=Path, metavar="DIR", help="a folder on the disk to measure")
    checkpoint.add_argument("--megabytes", type=int, default=512, metavar="MB", help="state of a rank (default 512)")
    checkpoint.add_argument("--saves", type=int, default=5, metavar="N", help="measured saves (default 5)")
    checkpoint.add_argument("--json", action="store_true", help="print one JSON document")
    add_ranks(checkpoint)
    checkpoint.set_defaults(run=_checkpoint, check=_check_checkpoint)
    collectives = family.add_parser(
        "collectives",
        help="all-reduces between the ranks: bandwidth, latency, right sums",
        description="All-reduce as training does (NCCL on GPUs, else gloo); under srun or torchrun, over all nodes.",
        epilog="example: ibq-scale bench collectives --megabytes 256 --ranks 8",
    )
    collectives.add_argument("--megabytes", type=int, default=64, metavar="MB", help="of a tensor (default 64)")
    collectives.add_argument("--repeats", type=int, default=5, metavar="N", help="measured turns (default 5)")
    collectives.add_argument("--json", action="store_true", help="print one JSON document")
    _add_write(collectives)
    add_ranks(collectives)
    collectives.set_defaults(run=_collectives, check=_check_collectives)
    _add_sampling(family)
    _add_steps(
        family,
        "tokenizer",
        about="images/s, MFU, memory and where the time goes in stage 1's step",
        details="Train the tokenizer for a few steps from its start and time their parts. Without data.train=… on "
        "noise; loss.perceptual=random costs what vgg does and needs no weights. Nothing is saved.",
        example="ibq-262144 train.global_batch=32 train.micro_batch=32 model.compile=true",
    )
    _add_steps(
        family,
        "ar",
        about="tokens/s, MFU, memory and where the time goes in stage 2's step",
        details="Train the transformer for a few steps from its start and time their parts. Without data.train=… on "
        "random codes. Nothing is saved.",
        example="xl train.global_batch=64 train.micro_batch=16",
    )


def _add_kernels(family: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    kernels = family.add_parser(
        "kernels",
        help="compile the kernels for GPUs that are not here",
        description="Compile every kernel of the quantizer, or of the norm, with every tile for GPUs, present or not, "
        "and print shared memory, registers, spills, tensor cores. Exit code 1: no tile of a kernel fits.",
        epilog="example: ibq-scale bench kernels --arch sm_80,sm_90 --precision bf16 --dim 64,256",
    )
    kernels.add_argument("--arch", default="sm_90", metavar="A[,A…]", help="sm_80, …, or all (default sm_90)")
    kernels.add_argument("--precision", default="bf16", metavar="P[,P…]", help="bf16, tf32, fp32 (default bf16)")
    kernels.add_argument(
        "--dim", default="256", metavar="D[,D…]", help="dimensions of codes, channels of norms (default 256)"
    )
    kernels.add_argument(
        "--kernel", default="all", metavar="K[,K…]", help="some of them (default: all with matrix products)"
    )
    kernels.add_argument("--json", action="store_true", help="print one JSON document")
    kernels.set_defaults(run=_kernels)


def _add_sampling(family: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sampling = family.add_parser(
        "sample",
        help="images/s and tokens/s beside a loop without a cache",
        description="Sample codes greedily with guidance in three ways, and compare their codes in fp32. A preset "
        "has random weights. Decoding is not timed.",
        epilog="example: ibq-scale bench sample xl --batch 64 --precision bf16 --compile",
    )
    sampling.add_argument("source", metavar="AR_CKPT_OR_PRESET")
    sampling.add_argument("--batch", type=int, default=32, metavar="N", help="images at once (default 32)")
    sampling.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the timed parts")
    sampling.add_argument("--compile", action="store_true", help="as of sample")
    sampling.add_argument("--repeats", type=int, default=3, metavar="N", help="measured batches (default 3)")
    sampling.add_argument("--json", action="store_true", help="print one JSON document")
    sampling.set_defaults(run=_sampling)


def _add_steps(
    family: argparse._SubParsersAction[argparse.ArgumentParser], task: str, *, about: str, details: str, example: str
) -> None:
    parser = family.add_parser(
        task, help=about, description=details, epilog=f"example: ibq-scale bench {task} {example}"
    )
    parser.add_argument("source", metavar="PRESET_OR_YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="measured optimizer steps (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    _add_write(parser)
    add_ranks(parser)
    parser.set_defaults(run=_steps, check=_steps_run, task=task)


def _add_write(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="keep it in ~/.cache/ibq-scale for plan and auto")


def _sizes(option: str, text: str) -> list[int]:
    """``4096,65536`` → numbers. UserError if unreadable."""
    items = text.split(",")
    if not all(item.strip().isdecimal() and int(item) > 0 for item in items):
        raise UserError(f"{option} {text}: write one or several positive numbers, for example 4096,65536")
    return [int(item) for item in items]


def _words(option: str, text: str, known: Sequence[Word], more: Sequence[Word] = ()) -> list[Word]:
    """``bf16,tf32`` → words. ``all``: every known one, without the extra ones. UserError for another word."""
    if text == "all":
        return list(known)
    words = {word: word for word in (*known, *more)}
    for word in text.split(","):
        if word.strip() not in words:
            raise UserError(f"{option} {text}: '{word.strip()}' is none of {', '.join(words)}, all")
    return [words[cast(Word, word.strip())] for word in text.split(",")]


def _quantizer(args: argparse.Namespace) -> int:
    from ibq_scale.bench.quantizer import Size, bench_quantizer

    at_least_one(args, "dim", "repeats")
    reports = []
    for tokens in _sizes("--tokens", args.tokens):
        for codes in _sizes("--codes", args.codes):
            report = bench_quantizer(
                Size(tokens, codes, args.dim),
                backend=args.backend,
                precision=args.precision,
                device=args.device,
                repeats=args.repeats,
            )
            reports.append(report)
            if not args.json:
                _print(report)
    if args.json:
        print(json.dumps([asdict(report) for report in reports]))
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from ibq_scale.bench.kernels import (
        ARCHS,
        KERNEL_NAMES,
        NORM_KERNEL_NAMES,
        OTHER_KERNEL_NAMES,
        PRECISIONS,
        kernel_rows,
    )

    rows = kernel_rows(
        _words("--kernel", args.kernel, KERNEL_NAMES, (*OTHER_KERNEL_NAMES, *NORM_KERNEL_NAMES)),
        _words("--arch", args.arch, ARCHS),
        _words("--precision", args.precision, PRECISIONS),
        _sizes("--dim", args.dim),
    )
    found = []
    for row in rows:
        found.append(row)
        if not args.json:
            _print_kernel(row, first=len(found) == 1)
    if args.json:
        print(json.dumps([asdict(row) for row in found]))
    missing = {row.case for row in found} - {row.case for row in found if row.fits}
    for kernel, arch, precision, dim in sorted(missing):
        print(f"no tile of {kernel} fits {arch} ({precision}, D = {dim})", file=sys.stderr)
    return 1 if missing else 0


def _print_kernel(row: Row, *, first: bool) -> None:
    if first:
        print(
            f"{'kernel':<18}{'arch':<8}{'precision':<10}{'dim':>4}  {'tile':<20}{'shared':>10}{'limit':>9}"
            f"{'registers':>11}{'spilled':>9}  {'tensor core':<12}{'async':>6}  fits"
        )
    tile = " × ".join(str(size) for size in row.tile[:3]) + f", {row.tile[3]}, {row.tile[4]}"
    fits = "yes" if row.fits else row.error or "no"
    print(
        f"{row.kernel:<18}{row.arch:<8}{row.precision:<10}{row.dim:>4}  {tile:<20}{row.shared_bytes:>10}"
        f"{row.shared_limit:>9}{row.registers:>11}{row.spill_bytes:>9}  {row.tensor_core:<12}{row.async_copies:>6}"
        f"  {fits}",
        flush=True,
    )


def _simulate_data(args: argparse.Namespace) -> int:
    from ibq_scale.bench.stream_plan import parse, walk
    from ibq_scale.config.run import DataConfig
    from ibq_scale.console import gigabytes

    extent = parse(args.simulate)
    found = walk(extent, DataConfig(cache_bytes=int(args.cache_bytes)), nodes=args.nodes, batch=args.batch)
    if args.json:
        print(json.dumps(asdict(found)))
        return 0
    print(f"{extent.samples:,} samples in {extent.shards:,} shards, {gigabytes(extent.bytes)}; {found.stream}")
    print(
        f"  walked {found.samples:,} samples on {found.nodes} of {args.nodes} nodes: {gigabytes(found.in_use)} in use, "
        f"{gigabytes(found.first_batch)} before the first batch"
    )
    print(
        f"  {found.served:.3f} bytes served for each that is read, {100 * found.singly:.2f} % of samples singly, "
        f"{found.again:,} shards fetched again"
    )
    return 0


def _data(args: argparse.Namespace) -> int:
    from ibq_scale.bench.data import bench_data

    at_least_one(args, "resolution", "batch", "nodes")
    if args.simulate:
        return _simulate_data(args)
    if args.url is None:
        raise UserError("give a data set's URL, or --simulate N-shards,B-bytes,S-samples")
    if args.workers < 0 or args.seconds <= 0:
        raise UserError("--workers must be at least 0 and --seconds above 0")
    report = bench_data(
        args.url,
        resolution=args.resolution,
        workers=args.workers,
        batch=args.batch,
        seconds=args.seconds,
        cache_dir=None if args.cache == "none" else args.cache,
    )
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    where = "from the cache" if report.cached else "by ranges"
    print(f"{report.url}: {report.images:,} images, {report.resolution}² crops, {report.workers} workers, {where}")
    for rate in report.rates:
        print(
            f"  {rate.name:<18}{rate.images_per_s:>9.0f} images/s{rate.mb_per_s:>9.1f} MB/s"
            f"{rate.per_core:>9.0f} images a CPU second"
        )
    print(
        f"  {report.of_plain:.2f} × plain webdataset ({report.of_plain_per_core:.2f} × a CPU second); "
        f"first batch after {report.first_batch_s:.2f} s"
    )
    return 0


def _check_checkpoint(args: argparse.Namespace) -> None:
    at_least_one(args, "megabytes", "saves", "ranks")
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is not a folder: name one on the disk to measure")


def _checkpoint(args: argparse.Namespace) -> int:
    from ibq_scale.bench.checkpoint import bench_checkpoint
    from ibq_scale.distributed.environment import join

    with join() as world:
        try:
            report = bench_checkpoint(args.folder, world, megabytes=args.megabytes, saves=args.saves)
        except OSError as e:
            raise UserError(f"{args.folder}: {e.strerror or e}") from None
        if world.is_main and args.json:
            print(json.dumps(asdict(report) | {"of_disk": report.of_disk}))
        elif world.is_main:
            size, rates = report.bytes / 1e6, (report.bytes_per_s / 1e9, report.disk_bytes_per_s / 1e9)
            print(f"{report.folder}: {size:,.0f} MB of {report.ranks} ranks, {report.saves} saves (medians)")
            print(f"  training pauses for {1e3 * report.stall_s:,.0f} ms; on disk after {report.written_s:.2f} s")
            print(f"  {rates[0]:.2f} GB/s, {report.of_disk:.2f} × a bare write ({rates[1]:.2f} GB/s)")
    return 0


def _check_collectives(args: argparse.Namespace) -> None:
    at_least_one(args, "megabytes", "repeats", "ranks")


def _collectives(args: argparse.Namespace) -> int:
    from ibq_scale.bench.collectives import bench_collectives
    from ibq_scale.bench.keep import keep_link
    from ibq_scale.distributed.environment import join

    with join() as world:
        report = bench_collectives(world, megabytes=args.megabytes, repeats=args.repeats)
        if world.is_main and args.write:
            tell(f"kept for plan and auto in {keep_link(report)}")
        if world.is_main and args.json:
            print(json.dumps(asdict(report)))
        elif world.is_main:
            where = f"{report.ranks} × {report.device} on {report.nodes} node{'s' * (report.nodes > 1)}"
            print(f"{where}, {report.backend}: {'sums are right' if report.right else 'SUMS ARE WRONG'}")
            print(
                f"  {gigabytes(report.bytes)} in {1e3 * report.seconds:.2f} ms (median of {report.repeats}): "
                f"{gigabytes(report.bus_bytes_per_s)}/s a rank's link; 8 KiB in {1e6 * report.latency_s:,.0f} µs"
            )
    return 0 if report.right else 1


def _sampling(args: argparse.Namespace) -> int:
    import torch

    from ibq_scale.bench.sampling import bench_sampling

    at_least_one(args, "batch", "repeats")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = bench_sampling(
        args.source,
        device,
        batch=args.batch,
        precision=args.precision,
        compiled=args.compile,
        repeats=args.repeats,
    )
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        _print_sampling(report)
    if not report.same_codes:
        print("the ways took different codes in fp32", file=sys.stderr)
        return 1
    return 0


def _print_sampling(report: SamplingReport) -> None:
    print(
        f"{report.name}: {report.parameters / 1e6:,.4g} M parameters, batch {report.batch}, guidance "
        f"{report.guidance:g}, {report.precision}{', compile' * report.compile}, {report.device}"
    )
    for way in report.ways:
        print(
            f"  {way.name:<22}{way.seconds:>9.3f} s{way.images_per_s:>10.3f} images/s"
            f"{way.tokens_per_s:>11,.0f} tokens/s{way.times_naive:>9.2f} × naive"
        )
    print(f"  {gigabytes(report.weight_bytes)} of weights a step, a cache of {gigabytes(report.cache_bytes)}")
    if report.bound_share is not None and report.bandwidth is not None:
        rate = report.bandwidth / 1e12
        print(f"  {100 * report.bound_share:.0f} % of what reading the weights at {rate:.4g} TB/s (data sheet) allows")


def _steps_run(args: argparse.Namespace) -> AnyRun:
    """Refuses wrong configs before any rank starts."""
    from ibq_scale.config.layers import resolve

    at_least_one(args, "steps", "ranks")
    return resolve(args.source, args.overrides, args.task).config


def _steps(args: argparse.Namespace) -> int:
    from ibq_scale.bench.keep import keep_rate
    from ibq_scale.config.run import TokenizerRun
    from ibq_scale.distributed.environment import join

    run = _steps_run(args)
    with join() as world:
        # DeepSpeed prints at its start. Standard output is for the report.
        with redirect_stdout(sys.stderr):
            report: TokenizerReport | ARReport
            if isinstance(run, TokenizerRun):
                from ibq_scale.bench.tokenizer import bench_tokenizer

                report = bench_tokenizer(run, world, steps=args.steps)
            else:
                from ibq_scale.bench.ar import bench_ar

                report = bench_ar(run, world, steps=args.steps)
        if world.is_main and args.write:
            tell(f"kept for plan and auto in {keep_rate(report, args.task, compiled=report.compile)}")
        if world.is_main and args.json:
            print(json.dumps(asdict(report)))
        elif world.is_main:
            _print_steps(report, args.task)
    return 0


def _print_steps(report: TokenizerReport | ARReport, task: str) -> None:
    values = asdict(report)
    again = values["activation_checkpointing"]
    chosen = ", compile" * values["compile"] + ", activation_checkpointing" * (again not in (False, "none"))
    threads = f" of {report.threads} threads" if report.device == "CPU" else ""
    if task == "ar":
        what = (
            f"{values['parameters'] / 1e6:,.4g} M parameters, {values['tokens']} codes of {values['codebook_size']:,}"
        )
        rate = f"{values['tokens_per_s']:,.4g} tokens/s, {report.images_per_s:.4g} images/s"
    else:
        what = f"{values['resolution']}², K = {values['codebook_size']:,}"
        rate = f"{report.images_per_s:.4g} images/s"
    print(
        f"{report.name}: {what}, {report.precision}{chosen}; batch {report.global_batch} in {report.micro_batch}s; "
        f"{report.ranks} × {report.device}{threads}; data {report.data}"
    )
    print(
        f"  {rate}, {report.step_s:.4g} s a step (median of {report.steps}); peak memory "
        f"{gigabytes(report.peak_bytes)}, {gigabytes(report.base_bytes)} of it before the first step"
    )
    _print_utilisation(report)
    print(f"  {'':<32}{'seconds':>10}{'share':>8}{'GFLOP':>12}{'GFLOP/s':>12}")
    for part in report.parts:
        work = f"{part.flops / 1e9:>12,.0f}{part.flops / part.seconds / 1e9:>12,.0f}" if part.flops else ""
        print(f"  {part.name:<32}{part.seconds:>10.4f}{100 * part.share:>6.1f} %{work}")


def _print_utilisation(report: StepReport) -> None:
    if report.mfu is None or report.sheet_flops is None:
        print(f"  no MFU: no data sheet's {report.precision} peak is known for {report.device}")
    else:
        print(f"  MFU {100 * report.mfu:.1f} % of {report.sheet_flops / 1e12:.4g} TFLOP/s (data sheet, dense bf16)")
    print(
        f"  {100 * report.of_product:.1f} % of the best product measured here ({report.product}: "
        f"{report.product_flops / 1e12:.4g} TFLOP/s a device)"
    )
    print(f"  {report.flops_per_image / 1e9:,.4g} GFLOP an image = {report.flops_formula}")


def _print(report: QuantizerReport) -> None:
    threads = f", {report.threads} threads" if report.device == "CPU" else ""
    print(
        f"N = {report.tokens:,}  K = {report.codes:,}  D = {report.dim}   "
        f"{report.device}{threads}, products in {report.precision}"
    )
    print(
        f"  {'':<13}{'seconds':>10}{'GFLOP/s':>10}{'× dense':>9}{'of products':>13}{'peak':>11}{'before':>10}  products"
    )
    for row in report.rows:
        print(f"  {row.name:<13}{_cells(row)}")
    print(f"  encode decided {100 * report.rescored:.2f} % of the tokens in fp64\n", flush=True)


def _cells(row: Measured) -> str:
    if row.seconds is None or row.flops_per_s is None or row.peak_bytes is None or row.base_bytes is None:
        return f"  {row.note}"
    times = f"{row.times_dense:.2f}" if row.times_dense is not None else "–"
    share = f"{100 * row.share_of_products:.0f} %" if row.share_of_products is not None else "–"
    memory = f"{row.peak_bytes / 1e9:>8.2f} GB{row.base_bytes / 1e9:>7.2f} GB"
    products = f"{row.products_done} of {row.products_needed} needed, {row.precision}"
    return f"{row.seconds:>10.4f}{row.flops_per_s / 1e9:>10.0f}{times:>9}{share:>13}{memory}  {products}"
