"""A checkpoint in DeepSpeed's own layout (0.19.8), for other tools such as its ``zero_to_fp32``.

The files are those of one rank of ZeRO-1: fp32 weights in one flat vector, with their names and shapes. Adam's moments
are left out, since training resumes from our own checkpoints, under any layout.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ibq_scale.checkpoint.pieces import WEIGHTS, PieceReader
from ibq_scale.checkpoint.reading import Checkpoint

ENGINES = ("generator", "discriminator", "transformer")


def export_deepspeed(checkpoint: Checkpoint, to: Path) -> list[Path]:
    """Writes ``to/ENGINE/`` for each engine of the checkpoint and returns them. UserError if it has no shapes."""
    tag = f"global_step{checkpoint.step}"
    written = []
    for engine in ENGINES:
        if not (checkpoint.path / engine).is_dir():
            continue
        reader = PieceReader(checkpoint.path / engine)
        weights = reader.tensors(WEIGHTS)
        flat = torch.cat([weight.view(-1) for weight in weights.values()])
        shapes = {name: weight.shape for name, weight in weights.items()}
        folder = to / engine / tag
        folder.mkdir(parents=True)
        state = {"zero_stage": 1, "partition_count": 1, "single_partition_of_fp32_groups": [flat]}
        torch.save({"optimizer_state_dict": state}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        torch.save(_model(shapes, reader), folder / "mp_rank_00_model_states.pt")
        (to / engine / "latest").write_text(tag, encoding="utf-8")
        written.append(to / engine)
    return written


def _model(shapes: dict[str, torch.Size], reader: PieceReader) -> dict[str, object]:
    buffers = {}
    for name, shape in reader.facts.get("buffers", {}).items():
        dtype = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        values = torch.empty(torch.Size(shape).numel(), dtype=dtype)
        reader.read(f"buffers/{name}", 0, values)
        buffers[name] = values.view(shape)
    return {
        "module": buffers,
        "buffer_names": list(buffers),
        "param_shapes": [shapes],
        "shared_params": {},
        "ds_version": "0.19.8",
    }
