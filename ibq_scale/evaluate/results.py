"""Files of an evaluation: its result, and for reconstructions a table of all images and a picture of the worst."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ibq_scale.checkpoint.files import write_whole
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.stream import single_images, to_float
from ibq_scale.errors import UserError
from ibq_scale.outputs import TABLE, WORST
from ibq_scale.pictures import to_uint8
from ibq_scale.pretrained.models import Tokenizer

MOST, COLUMNS = 50, 5
CELL, GAP, LINE = 128, 12, 14
GROUND, INK = (255, 255, 255), (20, 20, 20)


def write_result(path: Path, result: Any) -> None:
    """Writes a result (a dataclass) as JSON, as ``--json`` prints it. UserError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(result), indent=1) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None


def write_images(
    folder: Path, data: str, tokenizer: Tokenizer, columns: Sequence[str], rows_NC: Tensor, resolution: int | None
) -> None:
    """``images.jsonl``, one line per image in the data's order, and ``worst.png``, the 50 worst beside their originals.

    `rows_NC` holds position, shard, row, and the values of `columns`. The worst have the largest LPIPS (VGG before
    AlexNet), or the least PSNR if neither was measured. UserError if the folder cannot be written.
    """
    shards = [info.name for info in load_manifest(data, "images").shards]
    by = next((name for name in ("lpips", "lpips_alex") if name in columns), "psnr")
    value_N = rows_NC[:, 3 + list(columns).index(by)]
    worst = torch.argsort(value_N, descending=by != "psnr", stable=True)[:MOST]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / TABLE).open("w", encoding="utf-8") as f:
            for position, shard, row, *values in rows_NC.tolist():
                # JSON has no infinity, the PSNR of an exact reconstruction.
                known = (v if abs(v) < float("inf") else None for v in values)
                place = {"position": int(position), "shard": shards[int(shard)], "row": int(row)}
                f.write(json.dumps(place | dict(zip(columns, known, strict=True))) + "\n")
        sheet = _sheet(data, tokenizer, rows_NC[worst], value_N[worst].tolist(), by, resolution)
        sheet.save(folder / WORST, "PNG")
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror or e}") from None


@torch.inference_mode()
def _sheet(
    data: str, tokenizer: Tokenizer, rows_WC: Tensor, values: Sequence[float], by: str, resolution: int | None
) -> Image.Image:
    """Originals, each with its reconstruction on the right and its value below."""
    step = (2 * CELL + GAP, CELL + LINE + GAP)
    sheet = Image.new("RGB", (COLUMNS * step[0] + GAP, -(-len(rows_WC) // COLUMNS) * step[1] + GAP), GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    places = [(int(shard), int(row)) for _, shard, row, *_ in rows_WC.tolist()]
    pictures = single_images(data, places, resolution=resolution, multiple=tokenizer.downsampling)
    for i, (batch, value) in enumerate(zip(pictures, values, strict=True)):
        left, top = i % COLUMNS * step[0] + GAP, i // COLUMNS * step[1] + GAP
        decoded = tokenizer.reconstruct(to_float(batch.images_u8))
        for column, image_CHW in enumerate((batch.images_u8[0], to_uint8(decoded[0]))):
            small = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().cpu().numpy())
            times = CELL // max(small.size)
            if times > 1:
                small = small.resize((times * small.width, times * small.height), Image.Resampling.NEAREST)
            small.thumbnail((CELL, CELL))
            sheet.paste(small, (left + column * CELL, top + CELL - small.height))
        draw.text((left, top + CELL + 1), f"{by} {value:.4g}, position {int(rows_WC[i, 0])}", INK, font)
    return sheet
