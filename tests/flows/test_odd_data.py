"""Data as people have it: `clean` comes to its end, loses nothing, and says what it could not judge.

Faults that people meet in practice, and the tests of each kind:

- members of a sample apart, labels in a parallel folder: data/test_layout.py, and the remedies in flows/test_inspect.py
- compression that the name does not tell, a shard that is lost as a whole: flows/test_inspect.py,
  tar/test_compression.py
- several pictures a sample: data/test_several.py, flows/test_several.py; compound suffixes: data/test_layout.py,
  data/test_samples.py
- captions and no class: flows/test_inspect.py
- more than a thousand classes: data/test_labels.py, and here
- dots in names: data/test_layout.py
- labels that are no integer, one-based labels: data/test_labels.py, flows/test_inspect.py
- formats, profiles, 16 bits, damaged PPM: data/test_formats.py, data/test_decode.py
- gaps in the numbers, rare classes, one class: here, score/test_neighbours.py (rule fdr), condensation/test_stage.py
- which sample is it: data/test_layout.py, flows/test_inspect.py
- torn JPEGs that were encoded again: hygiene/test_stage.py, and here
- thousands of tiny shards: here, flows/test_plan.py
- too few noisy copies: certification/test_smoothing.py, flows/test_certify.py
"""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFile
from typer.testing import CliRunner

from flows.cli import app
from sanitize.jobs import JOBS
from sanitize.jobs.clean import CleanConfig
from sanitize.jobs.run import Run

Make = Callable[..., str]
SMALL: dict[str, Any] = {
    "embedder": {
        "architecture": {"kind": "convnet", "widths": [8, 16]},
        "optim": {"epochs": 4, "batch_size": 32, "learning_rate": 0.02},
        "min_steps": 40,
        "max_steps": 40,
    },
    "compute": {"device": "cpu"},
}


def stripes(label: int, seed: int, size: int = 16) -> np.ndarray:
    """Stripes at an angle that is the class, with a random phase and noise; uint8 (H, W, 3)."""
    rng = np.random.default_rng([label, seed])
    y, x = np.mgrid[:size, :size] / size
    wave = np.sin(2 * np.pi * (3 * (x * np.cos(0.3 * label) + y * np.sin(0.3 * label)) + rng.random()))
    pixels = 128 + 80 * wave[..., None] * rng.uniform(0.6, 1, 3) + rng.normal(0, 20, (size, size, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def members(labels: Sequence[int]) -> list[tuple[str, bytes]]:
    return [
        (f"{i:05d}.{suffix}", data)
        for i, label in enumerate(labels)
        for suffix, data in (("png", encoded(stripes(label, i))), ("cls", b"%d" % label))
    ]


def cleaned(folder: Path, *, scorers: Sequence[str] = ("toxic_direction",), **more: Any) -> tuple[dict[str, Any], str]:
    """Result of `sanitize clean` with exit code 0, and its page."""
    file = folder / "config.yaml"
    chosen = [{"kind": kind} for kind in scorers]
    file.write_text(yaml.safe_dump({**SMALL, **more, "scorers": chosen, "shards": [str(folder / "in")]}))
    command = ["clean", str(file), "--out", str(folder / "run"), "--direct", "--json", "--quiet"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), (folder / "run/90-report/index.html").read_text()


# Labels, and the number of classes that the page calls too small.
CLASSES: dict[str, tuple[list[int], int]] = {
    "gaps and rare classes": ([c for c in range(6) if c != 4 for _ in range(40)] + [7, 8, 8, 9, 9, 9, 12], 4),
    "one class": ([0] * 80, 0),
    "one sample of each class": (list(range(12)), 12),
}


@pytest.mark.parametrize("name", CLASSES)
def test_gaps_rare_classes_and_one_class_are_cleaned_and_rare_samples_stay(
    name: str, tmp_path: Path, make_tar: Make
) -> None:
    labels, n_small = CLASSES[name]
    make_tar(tmp_path / "in/x.tar", members(labels))
    result, page = cleaned(tmp_path, scorers=("toxic_direction", "neighbours", "label_margin"))
    counts = result["samples"]
    assert (counts["samples"], counts["unreadable"]) == (len(labels), 0)
    assert counts["quarantined"] <= 1, result  # `fdr` may be wrong about one in ten of what it removes
    assert page.count('<td class="note">too few samples to judge') == n_small
    (clean,) = (tmp_path / "run/50-shards/clean").glob("*.tar")
    with tarfile.open(clean) as tar:
        kept = {name for name in tar.getnames() if name.endswith(".cls")}
    rare = {f"{i:05d}.cls" for i, label in enumerate(labels) if labels.count(label) < 4}
    assert rare <= kept


def test_twenty_thousand_classes_most_of_which_are_empty_cost_no_more_than_their_numbers(
    tmp_path: Path, make_tar: Make
) -> None:
    labels = [int(label) for label in np.random.default_rng(0).integers(0, 21_841, 120)]
    make_tar(tmp_path / "in/x.tar", members(labels))
    result, page = cleaned(tmp_path, index={"n_classes": 21_841})
    assert result["samples"]["kept"] == 120
    assert "of 21,841 classes have no samples" in " ".join(result["notes"])
    # Nothing has a row for each class that nobody has: the page alone would be megabytes.
    assert sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.json")) < 4_000_000
    assert len(page) < 3_000_000


def test_torn_images_are_listed_and_are_no_poison(tmp_path: Path, make_tar: Make, monkeypatch: Any) -> None:
    """A cut JPEG that was decoded and saved again is grey at its end, and valid."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)

    def image(label: int, seed: int, torn: bool) -> bytes:
        data = encoded(stripes(label, seed, 64), "JPEG")
        if not torn:
            return data
        return encoded(np.array(Image.open(io.BytesIO(data[: len(data) // 2])).convert("RGB")), "JPEG")

    torn = {i for i in range(160) if i % 40 < 4}  # 10 % of each class
    labels = {i: i % 4 for i in range(160)}
    files = [
        (f"{i:05d}.{suffix}", data)
        for i, label in labels.items()
        for suffix, data in (("jpg", image(label, i, i in torn)), ("cls", b"%d" % label))
    ]
    monkeypatch.undo()
    make_tar(tmp_path / "in/x.tar", files)
    result, page = cleaned(tmp_path)
    assert result["hygiene"]["torn"] == len(torn)
    assert result["samples"]["quarantined"] == 0, result
    assert "as where a cut JPEG was decoded" in page


class Watched(Run):
    """A run that notes the groups of shards of each stage; under Prefect a group is a task."""

    groups: dict[str, list[list[str]]]

    def _call_groups(self, function: Any, groups: list[list[str]], *args: Any) -> None:
        self.groups[f"{function.__name__} {len(self.groups)}"] = groups
        super()._call_groups(function, groups, *args)


def test_sixty_tiny_shards_make_as_many_tasks_as_there_are_groups(tmp_path: Path, make_tar: Make) -> None:
    every = members([i % 4 for i in range(240)])
    for shard in range(60):
        make_tar(tmp_path / f"in/part-{shard:05d}.tar", every[8 * shard : 8 * shard + 8])
    brief = SMALL["embedder"] | {"min_steps": 1, "max_steps": 1, "canary": None}
    settings = {**SMALL, "embedder": brief, "shards": [str(tmp_path / "in")], "scorers": [{"kind": "spectral"}]}
    config = CleanConfig.model_validate(settings)
    run = Watched(str(tmp_path / "run"), config.compute, 4)
    run.groups = {}
    result = JOBS["clean"].function(config, run)
    assert result["samples"]["samples"] == 240
    assert len(run.groups) >= 4  # index, embeddings, scores, shards
    for groups in run.groups.values():
        assert len(groups) == 4
        assert len(set().union(*groups)) == sum(map(len, groups)) == 60
