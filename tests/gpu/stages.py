"""The stages of a quarter of an hour on a GPU (tests/gpu/quarter.py), as commands, in the order of their value."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CLI = (sys.executable, "-m", "ibq_scale")
CHECK = (sys.executable, "-m", "tests.gpu.checks")
# Networks at full size need no weights from elsewhere.
SYNTHETIC = ("loss.perceptual=random",)


@dataclass(frozen=True)
class Options:
    """`work`: a scratch folder. `small`: sizes for a CPU."""

    work: Path
    out: Path
    small: bool = False
    pictures: Path | None = None
    published: Path | None = None


@dataclass(frozen=True)
class Command:
    """`limit_s`: seconds after which its processes are killed. `env`: over the own environment."""

    name: str
    argv: tuple[str, ...]
    limit_s: float
    env: Mapping[str, str] = field(default_factory=dict)


def stages(options: Options) -> dict[str, list[Command]]:
    """Name → commands. The limits of all add to 12 minutes with what is not used up left over for the next."""
    return {
        "environment": _environment(options),
        "steps": _steps(options),
        "quantizer": _quantizer(options),
        "tokenizer": _tokenizer(options),
        "ar": _ar(options),
        "sampling": _sampling(options),
        "usage": _usage(options),
    }


def _environment(options: Options) -> list[Command]:
    tests = ["tests/models", "tests/quantize", "tests/losses"]
    marks = "not (slow or long or distributed or services)"
    pytest = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marks)
    if options.small:
        tests = ["tests/losses/test_adversarial.py"]
    return [
        Command("machine", (*CHECK, "machine"), 30),
        Command("kernels", (*CHECK, "kernels", *_small(options)), 60),
        Command("fast tests", (*pytest, *tests), 60),
        *(
            []
            if options.small
            else [Command("fused norm", (*pytest[:-1], "not long", "tests/models/test_fused_norm.py"), 30)]
        ),
        Command("data", (*CHECK, "data", str(options.work), *_small(options)), 40),
    ]


def _steps(options: Options) -> list[Command]:
    presets = ["tokenizer/ibq-16384", "ar/b", "tokenizer/ibq-262144", "ar/xl"]
    if options.small:
        presets = ["tokenizer/tiny", "ar/tiny"]
    commands = [
        Command(f"resume {preset}", (*CHECK, "resume", preset, str(options.work), *_small(options)), 60)
        for preset in presets
    ]
    first = [preset for preset in presets if not preset.endswith(("262144", "xl"))]
    return commands + [
        Command(f"first loss {preset}", (*CHECK, "first-loss", preset, str(options.work)), 45) for preset in first
    ]


def _quantizer(options: Options) -> list[Command]:
    tokens, codes = ("256", "1024") if options.small else ("1024,16384", "16384,262144")
    backends = ("tiled",) if options.small else ("auto", "cublas", "tiled")
    common = (*CLI, "bench", "quantizer", "--tokens", tokens, "--codes", codes, "--repeats", "3", "--json")
    return [Command(backend, (*common, "--backend", backend), 45) for backend in backends]


def _tokenizer(options: Options) -> list[Command]:
    preset = "tokenizer/tiny" if options.small else "tokenizer/ibq-16384"
    common = (*CLI, "bench", "tokenizer", "--steps", "3", "--json", preset, *SYNTHETIC)
    commands = [
        Command("eager", common, 45),
        Command("profile", (*CHECK, "profile", preset, str(options.work), str(options.out)), 40),
    ]
    if not options.small:
        commands.insert(1, Command("compiled", (*common, "model.compile=true"), 75))
    if options.published is not None:
        published = (sys.executable, "-m", "tests.tools.published_step", "--published", str(options.published))
        commands.append(Command("published", published, 60))
    return commands


def _ar(options: Options) -> list[Command]:
    if options.small:
        return [Command("tiny", (*CLI, "bench", "ar", "tiny", "--steps", "2", "--json"), 60)]
    variants = {
        "b": ("b",),
        "l": ("l",),
        "xl": ("xl",),
        "xxl": ("xxl",),
        "xl cuDNN attention": ("xl", "model.attention=sdpa_cudnn"),
        "xl no checkpointing": ("xl", "model.activation_checkpointing=none", "train.micro_batch=16"),
        "xl selective": ("xl", "model.activation_checkpointing=selective", "train.micro_batch=32"),
        "xl compiled": ("xl", "model.compile=true"),
        "xl fp8 compiled": ("xl", "model.fp8=true", "model.compile=true"),
    }
    return [
        Command(name, (*CLI, "bench", "ar", *words, "--steps", "3", "--json"), 75 if "compiled" in name else 35)
        for name, words in variants.items()
    ]


def _sampling(options: Options) -> list[Command]:
    preset, batch, workers = ("tiny", "2", "1") if options.small else ("xl", "64", "8")
    precision = "fp32" if options.small else "bf16"
    common = ("--precision", precision, "--repeats", "1", "--json")
    pictures = str(options.work / "pictures")
    stream = ("bench", "data", pictures, "--workers", workers, "--seconds", "4", "--json")
    return [
        Command("sample", (*CLI, "bench", "sample", preset, "--batch", batch, *common), 60),
        Command("stream", (*CLI, *stream), 60),
        Command("tokenize", (*CHECK, "tokenize", str(options.work), *_small(options)), 45),
    ]


def _usage(options: Options) -> list[Command]:
    seconds, sizes = (20, ("256",)) if options.small else (30, ("1024", "16384"))
    given = () if options.pictures is None else ("--pictures", str(options.pictures))
    return [
        Command(
            f"{kind} {codes}",
            (*CHECK, "usage", kind, codes, str(options.work), "--seconds", str(seconds), *_small(options), *given),
            seconds + 60,
        )
        for codes in sizes
        for kind in ("ibq", "vq")
    ]


def _small(options: Options) -> tuple[str, ...]:
    return ("--small",) if options.small else ()
