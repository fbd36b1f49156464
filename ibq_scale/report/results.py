"""Results of evaluations and samplings in or beside the runs: tables with the published figures, and pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ValidationError

from ibq_scale.checkpoint.reading import STEP_NAME
from ibq_scale.data.convert import to_rgb
from ibq_scale.documents import json_object, open_regular
from ibq_scale.generate.published import PUBLISHED
from ibq_scale.outputs import FACTS, GENERATION, GRID, RECONSTRUCTION, WORST
from ibq_scale.report.page import Block, Picture, Section, Table
from ibq_scale.report.runs import RunLog

# Figures of the paper. None: not stated.
SOURCE = "arXiv 2412.02692: ImageNet, 256 × 256 pixels, 16 × 16 codes"


# Name, codes, rFID, LPIPS, usage (0 to 1).
TOKENIZERS: tuple[tuple[str, int, float, float | None, float], ...] = (
    ("IBQ", 1024, 2.24, 0.2580, 0.99),
    ("IBQ", 8192, 1.87, 0.2437, 0.98),
    ("IBQ", 16384, 1.37, 0.2235, 0.96),
    ("IBQ", 262144, 1.00, 0.2030, 0.84),
    ("VQGAN", 1024, 7.94, None, 0.44),
    ("VQGAN", 16384, 4.98, None, 0.059),
)
# FID and inception score by size.
TRANSFORMERS = {"b": (2.88, 254.7), "l": (2.45, 267.5), "xl": (2.14, 279.0), "xxl": (2.05, 286.7)}

# Pixels of an embedded picture's longer side.
MOST_PIXELS = 1200
# Grids of samples, from a training's first to its last.
GRIDS = 3


class _Settings(BaseModel):
    guidance: float
    temperature: float


class _Sampled(BaseModel):
    settings: _Settings
    model: str | None = None


class _Stamp(BaseModel):
    images: int
    data: str


class _Reconstruction(BaseModel):
    data: str
    images: int
    resolution: int | None
    pixels: str
    codebook_size: int
    rfid: float | None
    lpips: float | None
    psnr: float | None
    ssim: float | None
    usage: float
    model: str | None = None


class _Generation(BaseModel):
    sampled: _Sampled | None
    images: int
    resolution: tuple[int, int]
    reference: str
    reference_hash: str
    reference_stamp: _Stamp | None
    extractor_sha256: str
    fid: float | None
    inception_score: float | None
    precision: float | None
    recall: float | None


# The shown fields of each kind of file. A file without them is from another program.
SHOWN: dict[str, type[BaseModel]] = {RECONSTRUCTION: _Reconstruction, GENERATION: _Generation, FACTS: _Sampled}


@dataclass(frozen=True)
class Result:
    """A result file of a run. `model`: the directory of its model, empty if unknown."""

    run: RunLog
    folder: Path
    facts: dict[str, Any]
    model: str

    @property
    def step(self) -> str:
        name = Path(self.model).parent.name
        step = STEP_NAME.fullmatch(name)
        return f"{int(step[1]):,}" if step else "–"

    def picture(self, name: str, caption: str) -> list[Block]:
        """The picture of this name beside the file, if it is there."""
        return pictures([(self.folder / name, f"{self.run.name}, {caption}", caption)])


def results_of(run: RunLog, name: str) -> list[Result]:
    """The files `name` within two folders of the run, or one beside it, about the run's model."""
    home = run.path.resolve()
    inside = [path for pattern in ("", "*/", "*/*/") for path in sorted(home.glob(pattern + name))]
    beside = [path for path in sorted(home.parent.glob(f"*/{name}")) if path not in inside]
    found = []
    for path in inside + beside:
        facts = json_object(path)
        try:
            SHOWN[name].model_validate(facts)
        except ValidationError:
            continue
        model = str((facts.get("sampled") or facts).get("model") or "")
        ours = Path(model).is_relative_to(home) if model else False
        # A moved run still owns its files.
        if ours or (path in inside and not (model and Path(model).exists())):
            found.append(Result(run, path.parent, facts, model))
    return found


def reconstruction_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """The table of ``evaluate reconstruction --to`` and the worst images. Empty without results."""
    found = [result for run in runs for result in results_of(run, RECONSTRUCTION)]
    if not found:
        return
    head = ["run", "step", "codes", "rFID", "LPIPS", "PSNR", "SSIM", "usage", "images", "size", "pixels", "data"]
    quoted = [
        [f"{name}, published", "–", f"{codes:,}", f"{rfid:.2f}", _figure(lpips, 4), "–", "–", _share(usage)]
        for name, codes, rfid, lpips, usage in TOKENIZERS
    ]
    caption = f"LPIPS: VGG. Published: {SOURCE}; comparable for equal data, size and pixels."
    table = Table(head, [_reconstruction_row(result) for result in found], caption, quoted)
    worst = [block for r in found for block in r.picture(WORST, "its worst images: original, reconstruction")]
    yield Section("Reconstruction", "", [table, *worst])


def generation_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Tables of ``evaluate generation --to``, one per reference, and pictures of samples."""
    found = [result for run in runs for result in results_of(run, GENERATION)]
    blocks: list[Block] = [_generation_table(same) for same in _by_reference(found)]
    for run in runs:
        for result in results_of(run, FACTS):
            settings = result.facts["settings"]
            knobs = f"guidance {settings['guidance']:g}, temperature {settings['temperature']:g}"
            blocks += result.picture(GRID, f"samples of step {result.step}, {knobs}: a class a row")
        blocks += _grids(run)
    if blocks:
        yield Section("Generation", "", blocks)


def pictures(named: Iterable[tuple[Path, str, str]]) -> list[Block]:
    """Pictures with text and caption, up to `MOST_PIXELS` a side. Damaged ones are left out."""
    found: list[Block] = []
    for path, text, caption in named:
        # Pillow's errors on damaged files.
        with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            found.append(Picture(small(path), text, caption))
    return found


def small(path: Path) -> bytes:
    """A PNG of limited size."""
    with open_regular(path) as file:
        content = file.read()
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if max(image.size) <= MOST_PIXELS:
            return content
        shrunk = to_rgb(image)
    shrunk.thumbnail((MOST_PIXELS, MOST_PIXELS))
    out = io.BytesIO()
    shrunk.save(out, "PNG")
    return out.getvalue()


def _reconstruction_row(result: Result) -> list[str]:
    facts = result.facts
    size = "native" if facts["resolution"] is None else f"{facts['resolution']} × {facts['resolution']}"
    measured = [_figure(facts[name], digits) for name, digits in (("rfid", 2), ("lpips", 4), ("psnr", 2), ("ssim", 4))]
    seen = [_share(facts["usage"]), f"{facts['images']:,}", size, facts["pixels"], facts["data"]]
    return [result.run.name, result.step, f"{facts['codebook_size']:,}", *measured, *seen]


def _by_reference(found: Sequence[Result]) -> list[list[Result]]:
    """The key of comparable results: reference, extractor and size."""
    groups: dict[str, list[Result]] = {}
    for result in found:
        key = [result.facts[name] for name in ("reference_hash", "extractor_sha256", "resolution")]
        groups.setdefault(json.dumps(key), []).append(result)
    return list(groups.values())


def _generation_table(found: Sequence[Result]) -> Table:
    head = ["run", "step", "guidance", "temperature", "gFID", "IS", "precision", "recall", "images"]
    rows = []
    for result in found:
        facts, settings = result.facts, (result.facts["sampled"] or {}).get("settings", {})
        knobs = [_figure(settings.get(name), 2) for name in ("guidance", "temperature")]
        measured = [_figure(facts["fid"], 2), _figure(facts["inception_score"], 1)]
        measured += [_figure(facts[name], 3) for name in ("precision", "recall")]
        rows.append([result.run.name, result.step, *knobs, *measured, f"{facts['images']:,}"])
    quoted = []
    for size, (fid, score) in TRANSFORMERS.items():
        *_, guidance, temperature = PUBLISHED[size]
        knobs = [_figure(guidance, 2), _figure(temperature, 2)]
        quoted.append([f"IBQ-{size.upper()}, published", "–", *knobs, _figure(fid, 2), _figure(score, 1)])
    facts = found[0].facts
    stamp, (height, width) = facts["reference_stamp"], facts["resolution"]
    of = f"{stamp['images']:,} images of {stamp['data']}" if stamp else f"{facts['reference']}, without a stamp"
    caption = (
        f"Against {of}, at {height} × {width}. Published: {SOURCE}; comparable for equal size, reference and number of "
        "images."
    )
    return Table(head, rows, caption, quoted)


def _grids(run: RunLog) -> list[Block]:
    """Pictures of validations, evenly from the first to the last."""
    drawn = run.pictures("samples")
    last = len(drawn) - 1
    chosen = sorted({round(i * last / (GRIDS - 1)) for i in range(GRIDS)}) if drawn else []
    said = "samples in training (the same classes and random numbers each time)"
    steps = [(drawn[i], int(drawn[i].stem.rpartition("-")[2])) for i in chosen]
    return pictures((path, f"{run.name}, step {step:,}: {said}", run.name) for path, step in steps)


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"
