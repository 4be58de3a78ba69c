"""The examples of how to train on a condensed set run, learn something, and need no trainer of ours."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

from sanitize.compute import Compute
from sanitize.condensation import CondenseConfig, CondensedSet, MatchingConfig, SiameseConfig, condense_dataset
from sanitize.data.dataset import Dataset
from sanitize.models.instance_convnet import InstanceConvNetConfig

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("train_on_*.py"))
NEEDS = {"train_on_condensed_lightning": "lightning", "train_on_condensed_datasets": "datasets"}
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def condensed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> CondensedSet:
    matching = MatchingConfig(
        images_per_class=2,
        iterations=60,
        learning_rate=5,
        batch_size=32,
        architecture=InstanceConvNetConfig(widths=(16, 16)),
        augment=SiameseConfig(flip=False),
    )
    out = tmp_path_factory.mktemp("condensed") / "condensed"
    return condense_dataset(CondenseConfig(matching=matching), dataset, str(out), compute)


def test_there_are_three() -> None:
    assert len(EXAMPLES) == 3


@every_example
def test_it_learns_the_condensed_images(
    example: Path,
    condensed: CondensedSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if (package := NEEDS.get(example.stem)) is not None:
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), condensed.path, "--epochs=40"])
    runpy.run_path(str(example), run_name="__main__")
    found = re.search(r"accuracy on the condensed images ([\d.]+)", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) > 0.7  # guessing: 0.1


@every_example
def test_it_is_a_page_without_a_trainer_of_ours(example: Path) -> None:
    source = example.read_text()
    assert len(source.splitlines()) <= 75
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not {name for name in imported if name and name.startswith(("sanitize.", "flows", "benchmarks"))}
