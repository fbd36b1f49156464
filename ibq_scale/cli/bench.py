"""``ibq-scale bench``: repeatable measurements."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from ibq_scale.cli.options import JSON, OVERRIDES, RANKS, Family, argument, finite, flag, real, show, whole
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


WRITE = flag("--write", "keep it in ~/.cache/ibq-scale for plan and auto")
OF_STEPS = (
    argument("source", metavar="PRESET_OR_YAML"),
    OVERRIDES,
    whole("--steps", "measured optimizer steps", 5),
    JSON,
    WRITE,
    RANKS,
)
FAMILY = Family("bench", "measure this machine", "what", "WHAT")
add_commands = FAMILY.add_commands


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


@FAMILY.command(
    "step time and memory beside the dense form and bare matrix products",
    "--tokens 1024 --codes 262144 --dim 256",
    argument("--tokens", default="1024", metavar="N[,N…]", help="tokens of a micro-batch (default 1024)"),
    argument("--codes", default="16384", metavar="K[,K…]", help="codebook sizes (default 16384)"),
    whole("--dim", "code dimension", 256, metavar="D"),
    argument("--backend", choices=("auto", "tiled", "triton", "cublas"), default="auto"),
    argument("--precision", choices=("fp32", "tf32", "bf16"), default="bf16", help="products on a GPU"),
    argument("--device", choices=("auto", "cpu", "cuda"), default="auto"),
    whole("--repeats", "measured turns", 5),
    JSON,
)
def _quantizer(args: argparse.Namespace) -> int:
    """Time the IBQ quantizer's training step and encoding; several sizes make a table over each."""
    from ibq_scale.bench.quantizer import Size, bench_quantizer

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


@FAMILY.command(
    "compile the kernels for GPUs that are not here",
    "--arch sm_80,sm_90 --precision bf16 --dim 64,256",
    argument("--arch", default="sm_90", metavar="A[,A…]", help="sm_80, …, or all (default sm_90)"),
    argument("--precision", default="bf16", metavar="P[,P…]", help="bf16, tf32, fp32 (default bf16)"),
    argument("--dim", default="256", metavar="D[,D…]", help="dimensions of codes, channels of norms (default 256)"),
    argument("--kernel", default="all", metavar="K[,K…]", help="some of them (default: all with matrix products)"),
    JSON,
)
def _kernels(args: argparse.Namespace) -> int:
    """Compile every kernel of the quantizer, or of the norm, with every tile for GPUs, present or not, and print shared
    memory, registers, spills, tensor cores. Exit code 1: no tile of a kernel fits.
    """
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

    extent = parse(args.simulate)
    found = walk(extent, DataConfig(cache_bytes=int(args.cache_bytes)), nodes=args.nodes, batch=args.batch)
    lines = [
        f"{extent.samples:,} samples in {extent.shards:,} shards, {gigabytes(extent.bytes)}; {found.stream}",
        f"  walked {found.samples:,} samples on {found.nodes} of {args.nodes} nodes: {gigabytes(found.in_use)} in use, "
        f"{gigabytes(found.first_batch)} before the first batch",
        f"  {found.served:.3f} bytes served for each that is read, {100 * found.singly:.2f} % of samples singly, "
        f"{found.again:,} shards fetched again",
    ]
    return show(args, found, lines)


@FAMILY.command(
    "images/s of the stream beside plain webdataset",
    "s3://bucket/imagenet --cache /local/cache --workers 4",
    argument("url", metavar="URL", nargs="?"),
    argument(
        "--simulate",
        metavar="N-shards,B-bytes,S-samples",
        help="no data: what each of --nodes would keep and download of such a set, --batch samples at a time",
    ),
    whole("--nodes", "for --simulate", 1),
    argument("--cache-bytes", type=finite, default=50e9, metavar="B", help="for --simulate (default 50e9)"),
    whole("--resolution", default=256, metavar="PIXELS"),
    argument("--workers", type=int, default=1, metavar="N", help="decoding processes (default 1; 0: none)"),
    whole("--batch", default=64),
    real("--seconds", "a turn's length", 5.0, above=0, metavar="S"),
    argument(
        "--cache",
        default="auto",
        metavar="DIR",
        help="local folder for shards, as data.cache_dir (default auto; none: a request for each sample)",
    ),
    JSON,
)
def _data(args: argparse.Namespace) -> int:
    """Read a prepared data set of images as training does, and as plain webdataset does, by turns."""
    from ibq_scale.bench.data import bench_data

    if args.simulate:
        return _simulate_data(args)
    if args.url is None:
        raise UserError("give a data set's URL, or --simulate N-shards,B-bytes,S-samples")
    if args.workers < 0:
        raise UserError("--workers must be at least 0")
    report = bench_data(
        args.url,
        resolution=args.resolution,
        workers=args.workers,
        batch=args.batch,
        seconds=args.seconds,
        cache_dir=None if args.cache == "none" else args.cache,
    )
    where = "from the cache" if report.cached else "by ranges"
    lines = [f"{report.url}: {report.images:,} images, {report.resolution}² crops, {report.workers} workers, {where}"]
    for rate in report.rates:
        speed = f"{rate.images_per_s:>9.0f} images/s{rate.mb_per_s:>9.1f} MB/s"
        lines.append(f"  {rate.name:<18}{speed}{rate.per_core:>9.0f} images a CPU second")
    lines.append(
        f"  {report.of_plain:.2f} × plain webdataset ({report.of_plain_per_core:.2f} × a CPU second); "
        f"first batch after {report.first_batch_s:.2f} s"
    )
    return show(args, report, lines)


def _check_checkpoint(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is not a folder: name one on the disk to measure")


@FAMILY.command(
    "how long a save stops training, and how fast it is written",
    "/shared/runs --megabytes 1024 --ranks 2",
    argument("folder", type=Path, metavar="DIR", help="a folder on the disk to measure"),
    whole("--megabytes", "state of a rank", 512, metavar="MB"),
    whole("--saves", "measured saves", 5),
    JSON,
    RANKS,
    check=_check_checkpoint,
)
def _checkpoint(args: argparse.Namespace) -> int:
    """Save a state of noise as training does, beside a bare write to the same disk."""
    from ibq_scale.bench.checkpoint import bench_checkpoint
    from ibq_scale.distributed.environment import join

    with join() as world:
        try:
            report = bench_checkpoint(args.folder, world, megabytes=args.megabytes, saves=args.saves)
        except OSError as e:
            raise UserError(f"{args.folder}: {e.strerror or e}") from None
        if not world.is_main:
            # The disk's rate is known to rank 0 alone.
            return 0
        size, rates = report.bytes / 1e6, (report.bytes_per_s / 1e9, report.disk_bytes_per_s / 1e9)
        lines = [
            f"{report.folder}: {size:,.0f} MB of {report.ranks} ranks, {report.saves} saves (medians)",
            f"  training pauses for {1e3 * report.stall_s:,.0f} ms; on disk after {report.written_s:.2f} s",
            f"  {rates[0]:.2f} GB/s, {report.of_disk:.2f} × a bare write ({rates[1]:.2f} GB/s)",
        ]
        return show(args, asdict(report) | {"of_disk": report.of_disk}, lines)


@FAMILY.command(
    "all-reduces between the ranks: bandwidth, latency, right sums",
    "--megabytes 256 --ranks 8",
    whole("--megabytes", "of a tensor", 64, metavar="MB"),
    whole("--repeats", "measured turns", 5),
    JSON,
    WRITE,
    RANKS,
)
def _collectives(args: argparse.Namespace) -> int:
    """All-reduce as training does (NCCL on GPUs, else gloo); under srun or torchrun, over all nodes."""
    from ibq_scale.bench.collectives import bench_collectives
    from ibq_scale.bench.keep import keep_link
    from ibq_scale.distributed.environment import join

    with join() as world:
        report = bench_collectives(world, megabytes=args.megabytes, repeats=args.repeats)
        if world.is_main and args.write:
            tell(f"kept for plan and auto in {keep_link(report)}")
        where = f"{report.ranks} × {report.device} on {report.nodes} node{'s' * (report.nodes > 1)}"
        lines = [
            f"{where}, {report.backend}: {'sums are right' if report.right else 'SUMS ARE WRONG'}",
            f"  {gigabytes(report.bytes)} in {1e3 * report.seconds:.2f} ms (median of {report.repeats}): "
            f"{gigabytes(report.bus_bytes_per_s)}/s a rank's link; 8 KiB in {1e6 * report.latency_s:,.0f} µs",
        ]
        if world.is_main:
            show(args, report, lines)
    return 0 if report.right else 1


@FAMILY.command(
    "images/s and tokens/s beside a loop without a cache",
    "xl --batch 64 --precision bf16 --compile",
    argument("source", metavar="AR_CKPT_OR_PRESET"),
    whole("--batch", "images at once", 32),
    argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the timed parts"),
    flag("--compile", "as of sample"),
    whole("--repeats", "measured batches", 3),
    JSON,
    name="sample",
)
def _sampling(args: argparse.Namespace) -> int:
    """Sample codes greedily with guidance in three ways, and compare their codes in fp32. A preset has random weights.
    Decoding is not timed.
    """
    import torch

    from ibq_scale.bench.sampling import bench_sampling

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = {"batch": args.batch, "precision": args.precision, "compiled": args.compile, "repeats": args.repeats}
    report = bench_sampling(args.source, device, **how)
    show(args, report, _sampling_lines(report))
    if not report.same_codes:
        print("the ways took different codes in fp32", file=sys.stderr)
    return 0 if report.same_codes else 1


def _sampling_lines(report: SamplingReport) -> Iterator[str]:
    yield (
        f"{report.name}: {report.parameters / 1e6:,.4g} M parameters, batch {report.batch}, guidance "
        f"{report.guidance:g}, {report.precision}{', compile' * report.compile}, {report.device}"
    )
    for way in report.ways:
        yield (
            f"  {way.name:<22}{way.seconds:>9.3f} s{way.images_per_s:>10.3f} images/s"
            f"{way.tokens_per_s:>11,.0f} tokens/s{way.times_naive:>9.2f} × naive"
        )
    yield f"  {gigabytes(report.weight_bytes)} of weights a step, a cache of {gigabytes(report.cache_bytes)}"
    if report.bound_share is not None and report.bandwidth is not None:
        rate = report.bandwidth / 1e12
        yield f"  {100 * report.bound_share:.0f} % of what reading the weights at {rate:.4g} TB/s (data sheet) allows"


def _run_of(args: argparse.Namespace) -> AnyRun:
    """Refuses wrong configs before any rank starts."""
    from ibq_scale.config.layers import resolve

    return resolve(args.source, args.overrides, args.task).config


@FAMILY.command(
    "tokens/s, MFU, memory and where the time goes in stage 2's step",
    "xl train.global_batch=64 train.micro_batch=16",
    *OF_STEPS,
    name="ar",
    details="Train the transformer for a few steps from its start and time their parts. Without data.train=… on random "
    "codes. Nothing is saved.",
    check=_run_of,
    task="ar",
)
@FAMILY.command(
    "images/s, MFU, memory and where the time goes in stage 1's step",
    "ibq-262144 train.global_batch=32 train.micro_batch=32 model.compile=true",
    *OF_STEPS,
    name="tokenizer",
    details="Train the tokenizer for a few steps from its start and time their parts. Without data.train=… on noise; "
    "loss.perceptual=random costs what vgg does and needs no weights. Nothing is saved.",
    check=_run_of,
    task="tokenizer",
)
def _steps(args: argparse.Namespace) -> int:
    from ibq_scale.bench.keep import keep_rate
    from ibq_scale.config.run import TokenizerRun
    from ibq_scale.distributed.environment import join

    run = _run_of(args)
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
        return show(args, report, _step_lines(report, args.task)) if world.is_main else 0


def _step_lines(report: TokenizerReport | ARReport, task: str) -> Iterator[str]:
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
    yield (
        f"{report.name}: {what}, {report.precision}{chosen}; batch {report.global_batch} in {report.micro_batch}s; "
        f"{report.ranks} × {report.device}{threads}; data {report.data}"
    )
    yield (
        f"  {rate}, {report.step_s:.4g} s a step (median of {report.steps}); peak memory "
        f"{gigabytes(report.peak_bytes)}, {gigabytes(report.base_bytes)} of it before the first step"
    )
    yield from _utilisation_lines(report)
    yield f"  {'':<32}{'seconds':>10}{'share':>8}{'GFLOP':>12}{'GFLOP/s':>12}"
    for part in report.parts:
        work = f"{part.flops / 1e9:>12,.0f}{part.flops / part.seconds / 1e9:>12,.0f}" if part.flops else ""
        yield f"  {part.name:<32}{part.seconds:>10.4f}{100 * part.share:>6.1f} %{work}"


def _utilisation_lines(report: StepReport) -> Iterator[str]:
    if report.mfu is None or report.sheet_flops is None:
        yield f"  no MFU: no data sheet's {report.precision} peak is known for {report.device}"
    else:
        yield f"  MFU {100 * report.mfu:.1f} % of {report.sheet_flops / 1e12:.4g} TFLOP/s (data sheet, dense bf16)"
    yield (
        f"  {100 * report.of_product:.1f} % of the best product measured here ({report.product}: "
        f"{report.product_flops / 1e12:.4g} TFLOP/s a device)"
    )
    yield f"  {report.flops_per_image / 1e9:,.4g} GFLOP an image = {report.flops_formula}"


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
