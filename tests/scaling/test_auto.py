"""Settings that a config leaves open: what a machine gives them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ibq_scale.cli.main import main
from ibq_scale.config.layers import resolve, with_values
from ibq_scale.config.run import AnyRun
from ibq_scale.data.shared_memory import cpus_of_rank
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.scaling.auto import HEADROOM, Choice, machine_of, open_keys, settle
from ibq_scale.scaling.plan import Machine, make_plan

# What the presets had before they left it open: micro-batch, DeepSpeed's JSON, checkpointing.
BEFORE: dict[str, tuple[int, str, str | bool]] = {
    "tokenizer/ibq-16384": (4, "zero2", False),
    "tokenizer/ibq-262144": (4, "zero2", False),
    "ar/b": (32, "zero1", "none"),
    "ar/l": (32, "zero1", "none"),
    "ar/xl": (16, "zero2", "none"),
    "ar/xxl": (16, "zero2", "none"),
    "ar/3b": (16, "zero3", "selective"),
    "ar/7b": (8, "zero3", "full"),
}
MACHINES = [
    Machine(1, 1, "rtx4090"),
    Machine(1, 1, "a100-40gb"),
    Machine(8, 1, "a100"),
    Machine(8, 1, "h100"),
    Machine(8, 8, "h100"),
    Machine(8, 128, "h100"),
    Machine(8, 1, "b200"),
]


def _run(preset: str, *words: str, world: int = 1) -> AnyRun:
    """With a global batch that the ranks divide."""
    run = resolve(preset, words).config
    images = run.train.global_batch
    return with_values(run, {"train.global_batch": -(-images // world) * world})


def _by_key(choices: tuple[Choice, ...]) -> dict[str, Any]:
    return {choice.key: choice.value for choice in choices}


def test_what_is_open_is_settled_and_fits() -> None:
    run = _run("ar/b")
    steps = ("train.micro_batch", "deepspeed.config", "model.activation_checkpointing")
    assert open_keys(run) == (*steps, "data.workers")
    settled, choices = settle(run, Machine(8, 1, "h100"))
    assert open_keys(settled) == ()
    assert _by_key(choices) == {
        "train.micro_batch": settled.train.micro_batch,
        "deepspeed.config": settled.deepspeed.config,
        "model.activation_checkpointing": settled.model.activation_checkpointing,
        "data.workers": 1,
    }
    assert make_plan(settled, Machine(8, 1, "h100"), mfu=0.5).memory.peak <= HEADROOM * 80e9
    # Nothing else has changed: not the global batch, the rates or the length.
    assert with_values(settled, dict.fromkeys(open_keys(run), "auto")) == run


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.micro_batch", 2), ("deepspeed.config", "zero3"), ("model.activation_checkpointing", "full")],
)
def test_what_is_set_is_kept(key: str, value: object) -> None:
    settled, choices = settle(with_values(_run("ar/b"), {key: value}), Machine(8, 1, "h100"))
    assert key not in _by_key(choices)
    section, _, name = key.partition(".")
    assert getattr(getattr(settled, section), name) == value


def test_nothing_is_asked_of_a_machine_where_all_is_set() -> None:
    run = _run("tokenizer/tiny", "codebook_group=0")
    assert settle(run, Machine(7, 1, "no such GPU")) == (run, ())


def test_without_a_known_memory_the_values_are_constants() -> None:
    choices = settle(_run("tokenizer/ibq-16384"), Machine(2, 1))[1]
    values = {"train.micro_batch": 4, "codebook_group": 0, "deepspeed.config": "zero1", "data.workers": 4}
    assert _by_key(choices) == values
    assert all("no GPU's memory" in choice.reason for choice in choices[:-1])
    assert settle(_run("ar/b", "train.global_batch=6"), Machine(2, 1))[0].train.micro_batch == 3


def test_a_global_batch_that_the_ranks_do_not_divide_is_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch=256 is no multiple"):
        settle(_run("tokenizer/ibq-16384"), Machine(3, 1, "h100"))


def test_data_workers_are_what_the_step_needs_within_the_ranks_cpus() -> None:
    set_otherwise = ("train.micro_batch=4", "codebook_group=1", "deepspeed.config=zero1")
    run = _run("tokenizer/ibq-16384", *set_otherwise)
    few, many = (settle(run, Machine(cpus=cpus))[0].data.workers for cpus in (2, 64))
    assert (few, many) == (1, 4)
    assert settle(_run("ar/b", *set_otherwise[::2], "model.activation_checkpointing=none"), Machine(cpus=64))[0] == (
        _run("ar/b", *set_otherwise[::2], "model.activation_checkpointing=none", "data.workers=1")
    )


def test_the_cpus_of_a_rank_are_its_tasks_or_a_share_of_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cpus_of_rank() == 4
    for name, value in (("SLURM_CPUS_PER_TASK", "12"), ("SLURM_NTASKS", "8"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert cpus_of_rank() == 12
    # torchrun's ranks within the task of a node.
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert cpus_of_rank() == 4


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_refused_with_the_memory_that_it_needs() -> None:
    with pytest.raises(UserError, match=r"ar-7b does not fit 1 GPUs of 4 GB: at least \d+ GB a GPU are needed"):
        settle(_run("ar/7b"), Machine(1, 1, memory=4e9))


@pytest.mark.slow
def test_the_least_memory_takes_checkpointing_and_offloading() -> None:
    small = _by_key(settle(_run("ar/7b"), Machine(1, 1, "rtx4090"))[1])
    assert small["deepspeed.config"].endswith("_offload")
    large = _by_key(settle(_run("ar/b"), Machine(1, 1, "b200"))[1])
    assert (large["deepspeed.config"], large["model.activation_checkpointing"]) == ("zero1", "none")


@pytest.mark.slow
def test_the_codebook_is_shared_by_fewer_ranks_where_links_are_slow() -> None:
    groups = [
        settle(_run("tokenizer/ibq-16384", world=machine.world), machine)[0]
        for machine in (Machine(8, 1, "h100"), Machine(8, 128, "h100"))
    ]
    assert [getattr(run, "codebook_group", None) for run in groups] == [1, 1]


def test_ranks_without_a_gpu_have_no_known_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("ibq_scale.scaling.auto.of_all_ranks", lambda world, mine: [mine] * world.size)
    monkeypatch.setattr("ibq_scale.scaling.auto.by_rank_0", lambda world, read: None)
    monkeypatch.setattr("ibq_scale.scaling.auto.cpus_of_rank", lambda: 3)
    assert machine_of(World(0, 6, 0, torch.device("cpu"))) == Machine(2, 3, cpus=3)


def test_among_different_gpus_the_smallest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [((85e9, "NVIDIA H100 80GB HBM3"), 2, 12), ((42e9, "NVIDIA A100-SXM4-40GB"), 2, 8)] * 2
    monkeypatch.setattr("ibq_scale.scaling.auto.of_all_ranks", lambda world, mine: found)
    monkeypatch.setattr("ibq_scale.scaling.auto.by_rank_0", lambda world, read: None)
    assert machine_of(World(0, 4, 0, torch.device("cpu"))) == Machine(2, 2, "A100 40GB", 42e9, cpus=8)


def test_config_show_tells_the_values_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["config", "show", "ar/b", "--gpus", "8", "--device", "h100"]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["config"]["train"]["micro_batch"] == 96
    assert document["origins"]["train.micro_batch"].startswith("auto: ")
    assert main(["config", "show", "ar/b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["train"]["micro_batch"] == "auto"
    assert main([*words[:-1], "x9000"]) == 2
    assert "give its --memory" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("preset", BEFORE)
def test_no_machine_gets_a_slower_step_than_the_presets_had(preset: str) -> None:
    micro, zero, again = BEFORE[preset]
    for machine in MACHINES:
        run = _run(preset, world=machine.world)
        settled, _ = settle(run, machine)
        plan = make_plan(settled, machine, mfu=0.5)
        assert plan.memory.peak <= HEADROOM * (machine.gpu_memory or 0)
        before = {"train.micro_batch": micro, "deepspeed.config": zero, "model.activation_checkpointing": again}
        try:
            old = make_plan(with_values(run, before), machine, mfu=0.5)
        except UserError:
            # Micro-batches of the old size do not divide the global batch over these ranks.
            continue
        assert plan.roofline is not None
        assert old.roofline is not None
        if old.fits:
            assert plan.roofline.total <= old.roofline.total * 1.02, machine
