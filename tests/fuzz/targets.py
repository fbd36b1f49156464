"""The kinds of files that come from other people, from an earlier run, or from a user's own editor."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random

import torch
from PIL import Image

from ibq_scale.checkpoint.mirror import Mirror
from ibq_scale.cluster.profile import PATH_VARIABLE
from ibq_scale.config.deepspeed import deepspeed_config
from ibq_scale.config.layers import PRESETS, SCHEMAS, flatten, resolve
from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig, TransformerConfig
from ibq_scale.config.run import DataConfig
from ibq_scale.data.images import BadSampleError
from ibq_scale.data.prepare import prepare_images
from ibq_scale.data.sets import open_sets
from ibq_scale.data.stream import code_stream, evaluation_images, image_stream
from ibq_scale.ladder.schema import LADDERS, ladder_names
from ibq_scale.pretrained.loading import load_model, save_ar, save_tokenizer, start_from
from ibq_scale.pretrained.models import ARModel, Tokenizer
from ibq_scale.pretrained.published import export_published, published_tokenizer
from ibq_scale.supervise.attempts import Attempt
from tests.data.layouts import pictures_of, write_parquet
from tests.fuzz.loop import Target, command
from tests.fuzz.mutations import ODD
from tests.nursery import run
from tests.samples import write_codes, write_pictures
from tests.train.runs import words as words_of_run

SIZES = AutoencoderConfig(
    channels=32,
    channel_multipliers=(1, 1),
    res_blocks=1,
    attention_resolutions=(8,),
    resolution=16,
    z_channels=8,
)


def _config(folder: Path) -> None:
    (folder / "run.yaml").write_text((PRESETS / "tokenizer/tiny.yaml").read_text())
    (folder / "above.yaml").write_text("preset: run.yaml\nname: mine\ntrain:\n  steps: 10\ndata:\n  weights: [1, 2]\n")
    (folder / "ar.yaml").write_text((PRESETS / "ar/tiny.yaml").read_text())


def _use_config(folder: Path, random: Random) -> None:
    what = ("plan",) if random.random() < 0.2 else ("config", "show")
    command(*what, random.choice(("run.yaml", "above.yaml", "ar.yaml")))


def _nothing(folder: Path) -> None:
    """What is drawn stands in no file."""


def _use_overrides(folder: Path, random: Random) -> None:
    task = random.choice(("tokenizer", "ar"))
    keys = [
        *flatten(SCHEMAS[task].model_construct().model_dump()),
        "model",
        "train",
        "a.b",
        "",
        "model.",
        ".x",
        "data.train[0]",
    ]
    given = []
    for _ in range(random.choice((1, 1, 3))):
        odd = random.choice(ODD)
        given.append(f"{random.choice(keys)}={odd if random.random() < 0.5 else json.dumps(odd)}")
    # A command line has no NUL.
    command("config", "show", f"{task}/tiny", *(word.replace("\0", "").replace("\ud800", "") for word in given))


def _images(folder: Path) -> None:
    write_pictures(folder / "pictures")
    prepare_images(folder / "pictures", str(folder / "set"), shard_bytes=8_000)


def _use_images(folder: Path, random: Random) -> None:
    match random.randrange(4):
        case 0:
            command("data", "verify", "set")
        case 1:
            command("data", "stats", "set")
        case 2:
            cache = random.choice(("null", str(folder / "cache")))
            data = DataConfig(train="set", workers=0, lanes=2, cache_dir=None if cache == "null" else cache)
            sets = open_sets(data, "images")
            batches = image_stream(sets, resolution=16, seed=0, rank=0, world_size=1, micro_batch=4, start=0)
            with suppress(BadSampleError):
                for _ in islice(batches, 4):
                    pass
        case _:
            with suppress(BadSampleError):
                for _ in islice(evaluation_images("set", resolution=16, rank=0, world_size=1, batch=8), 4):
                    pass


def _stamp_set(folder: Path) -> None:
    """Gives changed shards and indices the sizes and hashes that their manifest should have."""
    if not (folder / "set/manifest.json").is_file():
        return
    manifest = json.loads((folder / "set/manifest.json").read_text())
    for shard in manifest["shards"]:
        path = folder / "set" / shard["name"]
        data = path.read_bytes() if path.is_file() and path.parent == folder / "set" else b"x"
        shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        index = folder / "set" / f"{shard['name']}.index.json"
        if index.parent == folder / "set" and index.is_file() and shard.get("index_sha256"):
            shard["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
        table = folder / "set" / f"{shard['name']}.table"
        if table.parent == folder / "set" and table.is_file() and not table.is_symlink() and shard.get("index_sha256"):
            rows = table.read_bytes()[64:]
            digests = bytes.fromhex(shard["index_sha256"]) + hashlib.sha256(rows).digest()
            table.write_bytes(digests + rows)
    (folder / "set/manifest.json").write_text(json.dumps(manifest))


def _codes(folder: Path) -> None:
    write_codes(folder / "set")


def _use_codes(folder: Path, random: Random) -> None:
    if random.random() < 0.3:
        command("data", random.choice(("verify", "stats")), "set")
    else:
        sets = open_sets(DataConfig(train="set", workers=0, lanes=2), "codes")
        for _ in islice(code_stream(sets, seed=0, rank=0, world_size=1, micro_batch=4, start=0), 8):
            pass


def _tars(folder: Path) -> None:
    write_pictures(folder / "pictures")
    (folder / "tars").mkdir()
    pictures = sorted((folder / "pictures").rglob("*.*"))
    for n, label in enumerate((".cls", ".json")):
        with tarfile.open(folder / f"tars/{n}.tar", "w", format=tarfile.PAX_FORMAT if n else tarfile.GNU_FORMAT) as tar:
            for i, picture in enumerate(pictures[n::2]):
                key = f"{'deep/' * (i == 3)}{i:04d}{'é' * 60 * (i == 5)}"
                text = str(i % 3) if label == ".cls" else json.dumps({"label": i % 3, "score": 0.5, "caption": "x"})
                for name, data in ((key + picture.suffix, picture.read_bytes()), (key + label, text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    (folder / "parts").mkdir()
    for i, picture in enumerate(pictures[:6]):
        (folder / f"parts/{i}{picture.suffix}").write_bytes(picture.read_bytes())
        (folder / f"parts/{i}.cls").write_text(str(i % 3))
        (folder / f"parts/{i}.json").write_text(json.dumps({"label": i % 3, "caption": "x", "score": 0.5}))


def _use_tars(folder: Path, random: Random) -> None:
    with tarfile.open(folder / "tars/parts.tar", "w") as tar:
        for path in sorted((folder / "parts").iterdir()):
            tar.add(path, path.name)
    match random.randrange(3):
        case 0:
            command("data", "index", "tars")
            command("data", "verify", "tars")
        case 1:
            command(
                "prepare",
                "images",
                "tars",
                "--to",
                "out",
                *random.choice(((), ("--size", "16"), ("--where", "score>=0.1"))),
            )
        case _:
            command("prepare", "images", "tars/*.tar", "--to", "out", "--json")


def _pictures(folder: Path) -> None:
    write_pictures(folder / "pictures")


def _use_pictures(folder: Path, random: Random) -> None:
    command("prepare", "images", "pictures", "--to", "out", *random.choice(((), ("--size", "16"))))


def _parquet(folder: Path) -> None:
    write_pictures(folder / "pictures")
    found = pictures_of(folder / "pictures")
    write_parquet(folder / "rows", found, label=[p.label for p in found], score=[0.5] * len(found))


def _use_parquet(folder: Path, random: Random) -> None:
    command("prepare", "images", "rows", "--to", "out", *random.choice(((), ("--where", "score>=0.1"))))


def _ladder(folder: Path) -> None:
    (folder / "mine.yaml").write_text((LADDERS / f"{ladder_names()[0]}.yaml").read_text())


def _use_ladder(folder: Path, random: Random) -> None:
    odd = f"out={random.choice(ODD)!s:.300}".replace("\0", "").replace("\ud800", "")
    command("scale", random.choice(("plan", "collect", "fit")), "mine.yaml", *random.choice(((), (odd,))))


def _deepspeed(folder: Path) -> None:
    for path in (Path(__file__).resolve().parents[2] / "deepspeed_configs").glob("*.json"):
        (folder / path.name).write_text(path.read_text())


def _use_deepspeed(folder: Path, random: Random) -> None:
    config = random.choice(sorted(folder.glob("*.json")))
    run = resolve("ar/tiny", ["data.train=x", "out=y", f"deepspeed.config={config}"]).config
    deepspeed_config(run, 2)


def _models(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(SIZES, QuantizerConfig(codebook_size=16, dim=8))
    save_tokenizer(folder / "tok", tokenizer, {"run": "x"})
    config = TransformerConfig(codebook_size=16, classes=3, tokens=64, depth=2, heads=2, width=32)
    save_ar(folder / "ar", ARModel(config, tokenizer.hash), {})


def _use_models(folder: Path, random: Random) -> None:
    path = random.choice(("tok", "ar"))
    match random.randrange(3):
        case 0:
            model = load_model(path)
            if isinstance(model, Tokenizer):
                model.reconstruct(torch.zeros(1, 3, 16 * model.downsampling, 16 * model.downsampling))
        case 1:
            command("checkpoint", "export", path, "--to", "out")
        case _:
            start_from("tok", Tokenizer(SIZES, QuantizerConfig(codebook_size=16, dim=8)).autoencoder)


def _published(folder: Path) -> None:
    _models(folder)
    for name in ("tok", "ar"):
        export_published(folder / name, folder / f"{name}.ckpt")
    tokenizer = load_model(folder / "tok")
    ar = load_model(folder / "ar")
    assert isinstance(tokenizer, Tokenizer)
    # As the published code writes them: the sizes stand in the tensors alone.
    torch.save({"state_dict": published_tokenizer(tokenizer)}, folder / "bare.ckpt")
    torch.save(dict(ar.state_dict()), folder / "bare-ar.ckpt")


def _use_published(folder: Path, random: Random) -> None:
    name = random.choice(("tok", "ar", "bare", "bare-ar"))
    command("checkpoint", "import", f"{name}.ckpt", "--to", "out", *random.choice(((), ("--ema",))))


def _run(folder: Path) -> None:
    write_pictures(folder / "pictures")
    prepare_images(folder / "pictures", str(folder / "set"), shard_bytes=8_000)
    done = run(
        [
            *words_of_run(str(folder / "set"), folder / "runs/a", "train.steps=2", "data.workers=0", "name=a"),
            "--ranks",
            "1",
        ]
    )
    assert done.returncode == 0, done.stderr
    attempt = Attempt("1", 0, 75, 0, 2, "n", 5.0, (), True, "x", "2026-11-30T00:00:00+00:00")
    (folder / "runs/a/attempts.jsonl").write_text(json.dumps(asdict(attempt)) + "\n")
    figures = dict.fromkeys(
        ("rfid", "lpips", "psnr", "ssim", "usage", "fid", "inception_score", "precision", "recall"), 0.5
    )
    measured = figures | {"data": "x", "images": 10, "resolution": 16, "pixels": "u8", "codebook_size": 64}
    (folder / "runs/a/reconstruction.json").write_text(json.dumps(measured))
    sampled = {"settings": {"guidance": 2.0, "temperature": 1.0}, "model": None}
    hashes = {"reference": "r", "reference_hash": "h", "extractor_sha256": "e"}
    stamp = {"reference_stamp": {"images": 10, "data": "x"}}
    (folder / "runs/a/generation.json").write_text(
        json.dumps(figures | hashes | stamp | {"sampled": sampled, "images": 10, "resolution": [16, 16]})
    )
    (folder / "runs/a/samples.json").write_text(json.dumps(sampled))
    for name in ("worst", "grid", "images/samples-00000002", "images/reconstructions-00000002"):
        (folder / f"runs/a/{name}.png").parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), "green").save(folder / f"runs/a/{name}.png")
    (folder / "runs/a/heartbeat.json").write_text(json.dumps({"step": 1, "step_s": 0.5, "phase": "step", "host": "h"}))


def _use_run(folder: Path, random: Random) -> None:
    match random.randrange(7):
        case 0:
            command("jobs", "runs/a")
        case 1:
            command("report", "runs/a", "--out", "page.html")
        case 2:
            command("checkpoint", "ls", "runs/a")
        case 3:
            command("checkpoint", "verify", "runs/a")
        case 4:
            command("job-ended", "runs/a", "--code", "75", "--seconds", "700", "--attempts", "3")
        case 5:
            load_model("runs/a")
        case _:
            mirror = Mirror(str(folder / "runs/a/checkpoints"))
            for copy in mirror.whole(mirror.copies()):
                mirror.fetch(copy, copy.manifest["files"], folder / "fetched")


def _cluster(folder: Path) -> None:
    profile = {
        "default": "big",
        "profiles": {
            "big": {
                "partition": "gpu",
                "nodes": 2,
                "gpus_per_node": 4,
                "cpus_per_task": 4,
                "gpu": "h100",
                "time": "1-00:00:00",
                "env": {"NCCL_DEBUG": "INFO"},
                "setup": ["module load cuda"],
                "srun": ["--mpi=none"],
                "inside": ["env"],
                "sbatch": ["reservation=x"],
            }
        },
    }
    (folder / "clusters.yaml").write_text(json.dumps(profile))
    write_codes(folder / "set")


def _use_cluster(folder: Path, random: Random) -> None:
    os.environ[PATH_VARIABLE] = str(folder / "clusters.yaml")
    given = ["submit", "ar/tiny", "data.train=set", f"out={folder / 'run'}", "--dry-run"]
    if random.random() < 0.3:
        odd = str(random.choice(ODD)).replace("\0", "").replace("\ud800", "")
        given += [random.choice(("--time", "--mem", "--sbatch", "--partition", "--constraint")), odd]
    command(*given)


TARGETS = {
    target.name: target
    for target in (
        Target("configs", _config, ("*.yaml",), _use_config),
        Target("overrides", _nothing, (), _use_overrides),
        Target(
            "images",
            _images,
            ("set/manifest.json", "set/*.index.json", "set/*.table", "set/*.tar"),
            _use_images,
            _stamp_set,
        ),
        Target("codes", _codes, ("set/manifest.json", "set/*.safetensors"), _use_codes, _stamp_set),
        Target("tars", _tars, ("tars/*.tar", "parts/*"), _use_tars),
        Target("parquet", _parquet, ("rows/data/*.parquet",), _use_parquet),
        Target("ladders", _ladder, ("*.yaml",), _use_ladder),
        Target("deepspeed", _deepspeed, ("*.json",), _use_deepspeed),
        Target("pictures", _pictures, ("pictures/*/*",), _use_pictures),
        Target("models", _models, ("*/config.json", "*/*.safetensors"), _use_models),
        Target("published", _published, ("*.ckpt",), _use_published),
        Target(
            "runs",
            _run,
            ("runs/a/*", "runs/a/checkpoints/*/manifest.json", "runs/a/checkpoints/*/*/*", "runs/a/images/*"),
            _use_run,
        ),
        Target("clusters", _cluster, ("clusters.yaml",), _use_cluster),
    )
}
