"""Exports a transformer as a folder for Hugging Face transformers, with the code of its model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ibq_scale.errors import UserError
from ibq_scale.pretrained.huggingface import write_folder
from ibq_scale.pretrained.loading import Kind, load_ar, refuse_overwrite

CODE = Path(__file__).with_name("modeling_ibq.py")
CARD = """---
library_name: transformers
tags: [autoregressive-image-generation]
---

# {name}

A class-conditional transformer over {tokens} image codes of {codebook_size:,}, {classes:,} classes.

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
ids = {codebook_size} + torch.tensor([[label]])  # label {classes}: no class
none = torch.full_like(ids, {codebook_size} + {classes})
codes = model.generate(ids, guidance_scale=2.0, negative_prompt_ids=none)[:, 1:]  # raster order
```
"""


def export_transformers(path: Path, to: Path) -> Kind:
    """Writes a transformer as a folder for transformers: sizes, fp32 weights, and the code of the model.

    ``AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True)`` loads it without ibq_scale. UserError for
    another kind of model, or if `to` exists.
    """
    refuse_overwrite(to)
    model = load_ar(path)
    sizes = model.config.architecture()
    if sizes.conditioning == "embedding":
        raise UserError(
            f"{path} has model.conditioning=embedding: --layout transformers takes class-conditional models "
            "(adaln, prefix)"
        )
    names = ("codebook_size", "classes", "tokens", "depth", "heads", "width", "ffn_hidden", "conditioning", "qk_norm")
    config = {name: getattr(sizes, name) for name in names} | {
        "architectures": ["IBQForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE.stem}.IBQConfig", "AutoModelForCausalLM": f"{CODE.stem}.IBQForCausalLM"},
        "model_type": "ibq_ar",
        "kv_heads": sizes.kv_groups,
        "tokenizer": model.tokenizer_hash,
        "dtype": "float32",
    }
    # All codes of an image, from the whole distribution.
    generation = {"do_sample": True, "max_new_tokens": sizes.tokens, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    write_folder(to, model.transformer.state_dict(), config)
    (to / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(CODE, to / CODE.name)
    (to / "README.md").write_text(CARD.format(name=to.name, **config), encoding="utf-8")
    return "ar"
