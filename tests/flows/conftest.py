"""One real Prefect server for the session, a small poisoned data set to run flows on, and a store with a reference."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import flows  # noqa: F401 - sets Prefect's environment before Prefect is imported
from flows.start import start
from sanitize.attack import BadNetsConfig, poison_shards
from sanitize.compute import Compute
from sanitize.data.digits import Digits, write_digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.jobs import reference
from sanitize.jobs.clean import CleanConfig
from tests.flows.stores import LEVEL


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """URL of a server that lives as long as the tests."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with five shards of real digits, 2 % of them with a patch and label 0."""
    out = tmp_path_factory.mktemp("poisoned")
    compute = Compute(device="cpu")
    digits = write_digits(str(out / "digits"), compute, n_shards=5)
    dataset = index_shards(IndexConfig(n_classes=10), digits.shards(), str(out / "index"), compute)
    return poison_shards(BadNetsConfig(rate=0.02, size=3), dataset, str(out / "poisoned"), compute).file("shards")


@pytest.fixture(scope="session")
def settings(poisoned: Path) -> dict[str, Any]:
    """A quick configuration for it, as YAML would hold it."""
    return {
        "shards": [str(poisoned)],
        "embedder": {
            "architecture": {"kind": "convnet", "widths": [16, 32, 64]},
            "optim": {"epochs": 30, "batch_size": 64},
        },
        "compute": {"device": "cpu", "seed": 0},
    }


@pytest.fixture(scope="session")
def config_file(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on disk."""
    path = tmp_path_factory.mktemp("config") / "clean.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def direct(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted direct run."""
    out = tmp_path_factory.mktemp("direct") / "run"
    start(CleanConfig.model_validate(settings), out, direct=True)
    return out


# --- a store -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def approved(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on eight clean shards."""
    settings = {
        "shards": digits.shards()[:8],
        "embedder": {
            "architecture": {"kind": "convnet", "widths": [8, 16]},
            "optim": {"epochs": 3, "batch_size": 32, "learning_rate": 0.02},
            "min_steps": 1,
            "max_steps": 1,
            "canary": None,
        },
        "scorers": [{"kind": "spectral"}],
        "compute": {"device": "cpu"},
        "n_groups": 1,
    }
    out = tmp_path_factory.mktemp("approved") / "run"
    start(CleanConfig.model_validate(settings), out, direct=True)
    return out


@pytest.fixture(scope="session")
def referenced(approved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a reference and nothing else; it is copied, not used."""
    store = tmp_path_factory.mktemp("referenced") / "store"
    made = reference(run=approved, out=store, level=LEVEL, note="looked at").summary
    assert (made["reference"], made["shards"]) == (1, 8)
    return store


@pytest.fixture
def store(referenced: Path, tmp_path: Path) -> Path:
    return shutil.copytree(referenced, tmp_path / "store")


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    (tmp_path / "incoming").mkdir()
    return tmp_path / "incoming"
