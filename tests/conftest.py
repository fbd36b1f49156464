"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests import nursery
from tests.faults import FaultProxy, fault_proxy
from tests.samples import write_pictures
from tests.web import WebServer

if not torch.cuda.is_available():
    # Triton decides when a kernel is defined: before anything imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ranks have one thread each, and how sums are split over threads decides how they are rounded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# No outcome depends on the machine's load.
hypothesis.settings.register_profile("any load", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any load")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# Not the demo's own, which a test of the demo makes in this same process.
TEST_BUCKET = "ibq-tests"


LONGEST_FIRST = ("services", "long", "distributed", "slow")
# In one worker each: two clusters side by side would take the same cores, and plans keep what they rehearsed.
GROUPS = {
    "tests/services/test_real_slurm.py": "slurm",
    "tests/services/test_real_submit.py": "slurm",
    "tests/scaling/test_plan.py": "plans",
    "tests/scaling/test_auto.py": "plans",
}
_SESSION = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """Starts the session's fork server in the controller: xdist workers inherit its address.

    They inherit a cache folder of the session too, without the rates that this user's benches have measured.
    """
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        os.environ["XDG_CACHE_HOME"] = _SESSION.enter_context(_cache_folder())
        os.environ[nursery.ADDRESS] = _SESSION.enter_context(nursery.server())


@contextmanager
def _cache_folder() -> Iterator[str]:
    """Empty, but for the compiled extensions of torch and DeepSpeed, which take minutes to build."""
    built = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    built.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        (Path(folder) / built.name).symlink_to(built.resolve())
        yield folder


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the fork server, where this process started it."""
    _SESSION.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts what takes long first, so that no worker is left with it at the end."""
    items.sort(key=_rank)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Spreads single tests over the workers, but for those of a group: see `_Scheduler`."""
    return _Scheduler(config, log)


class _Scheduler(LoadScopeScheduling):
    """A group runs in one worker: the tests of a file with module fixtures, and `GROUPS`.

    xdist's own groups are markers, which it loses with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return GROUPS.get(path) or (path if _shares_fixtures(path) else nodeid)


@cache
def _shares_fixtures(path: str) -> bool:
    return 'scope="module"' in (ROOT / path).read_text()


def _rank(item: pytest.Item) -> int:
    """0 runs first."""
    return next((rank for rank, mark in enumerate(LONGEST_FIRST) if item.get_closest_marker(mark)), len(LONGEST_FIRST))


def _shared(name: str, what: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"{what} not found: this test reads {name}/ in a folder 'shared' beside the checkout")
    return path


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Numbers of the published code, kept outside the repository."""
    return _shared("parity", "the published code's numbers are")


@pytest.fixture(scope="session")
def imagenet_mini_dir() -> Path:
    """800 photographs in ImageFolder layout, kept outside the repository (research use only)."""
    return _shared("data/imagenet-mini", "the 800 photographs are")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of 3 classes × 8 small smooth pictures of several sizes, JPEG and PNG."""
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root)
    return root


@pytest.fixture(scope="session")
def dataset(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """`pictures`, prepared: 24 samples in several shards. Read only."""
    from ibq_scale.data.prepare import prepare_images

    to = str(tmp_path_factory.mktemp("dataset"))
    prepare_images(pictures, to, shard_bytes=8_000)
    return to


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    """A real HTTP S3 endpoint; the environment of this process and its children points at it."""
    from ibq_scale.demo.server import object_storage

    with object_storage(TEST_BUCKET):
        yield


@pytest.fixture(scope="session")
def new_prefix(s3_server: None) -> Callable[[], str]:
    """Makes a fresh ``s3://bucket/prefix`` a call."""
    numbers = count()
    return lambda: f"s3://{TEST_BUCKET}/test-{os.getpid()}-{next(numbers)}"


@pytest.fixture
def proxy(s3_server: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the S3 endpoint of the tests; stores opened from here on go through it, and retry without pauses."""
    from ibq_scale.data import store as store_module

    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setattr(store_module, "PAUSE_SECONDS", 0.01)
        monkeypatch.setattr(store_module, "DEADLINE_SECONDS", 10.0)
        yield running


@pytest.fixture
def web_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """HTTP on loopback, past any proxy; downloads from it do not pause between attempts."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("ibq_scale.download.FIRST_PAUSE_S", 0.0)
    server = WebServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained small tokenizer: 32×32 images, 8×8 codes of 64."""
    from ibq_scale.pretrained.loading import Tokenizer, save_tokenizer

    return _save(tmp_path_factory, "tokenizer", lambda: Tokenizer(*tiny_tokenizer_sizes()), save_tokenizer)


@pytest.fixture(scope="session")
def ar_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained small transformer of the codes of `tokenizer_dir`, its head not zero."""
    from ibq_scale.config.models import TransformerConfig
    from ibq_scale.pretrained.loading import ARModel, load_tokenizer, save_ar

    def make() -> ARModel:
        config = TransformerConfig(codebook_size=64, classes=3, tokens=64, depth=2, heads=2, width=32)
        model = ARModel(config, load_tokenizer(tokenizer_dir).hash)
        torch.nn.init.normal_(model.transformer.head.weight, std=0.5)
        return model

    return _save(tmp_path_factory, "ar", make, save_ar)


def tiny_tokenizer_sizes() -> tuple:
    """Configs of `tokenizer_dir`'s model."""
    from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig

    model = AutoencoderConfig(
        channels=32,
        channel_multipliers=(1, 1, 1),
        res_blocks=1,
        attention_resolutions=(8,),
        resolution=32,
        z_channels=16,
    )
    return model, QuantizerConfig(codebook_size=64, dim=16)


def _save(factory: pytest.TempPathFactory, name: str, make: Callable, save: Callable) -> Path:
    folder = factory.mktemp(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make()
        if hasattr(model, "codebook_KD"):
            model.codebook_KD.normal_()
        save(folder, model, {})
    return folder
