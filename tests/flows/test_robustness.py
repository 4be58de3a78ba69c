"""PCA-noise and attacks from shards to the page: the same however they are called."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flows.cli import app
from flows.start import start
from sanitize.artifacts import read_manifest
from sanitize.certification import PartitionConfig
from sanitize.data.digits import Digits
from sanitize.data.samples import ShardReader
from sanitize.errors import ConfigError
from sanitize.jobs.denoise import DenoiseRunConfig
from sanitize.jobs.robustness import RobustnessRunConfig
from sanitize.jobs.train import TrainRunConfig
from sanitize.measure import EvasionConfig, Robustness, smallest_perturbation
from sanitize.models.pixels import OnPixels
from sanitize.packaging import open_model

RUNNER = CliRunner()
INDEX = {"n_classes": 10, "image": {"size": [8, 8], "channels": 1}}


@pytest.fixture(scope="module")
def denoise_settings(digits: Digits) -> dict[str, Any]:
    settings = {"shards": digits.shards()[:4], "index": INDEX, "denoise": {"dims": 20, "noise_dims": 4}}
    return settings | {"compute": {"device": "cpu"}}


@pytest.fixture(scope="module")
def denoised(denoise_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("denoise") / "run"
    start(DenoiseRunConfig.model_validate(denoise_settings), out, direct=True)
    return out


@pytest.fixture(scope="module")
def network(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("robustness") / "network"
    of_train = {"architecture": {"kind": "mlp", "widths": [32]}, "optim": {"epochs": 6, "learning_rate": 0.01}}
    settings = {"shards": digits.shards()[:4], "index": INDEX, "train": of_train, "compute": {"device": "cpu"}}
    start(TrainRunConfig.model_validate(settings), out, direct=True)
    return out


def digests(run: Path) -> dict[str, str]:
    return {path.parent.name: read_manifest(str(path.parent)).digest for path in run.glob("*/manifest.json")}


@pytest.mark.usefixtures("prefect_server")
def test_denoising_in_groups_as_prefect_tasks_gives_the_same_digests(
    denoised: Path, denoise_settings: dict[str, Any], tmp_path: Path
) -> None:
    config = DenoiseRunConfig.model_validate(denoise_settings | {"n_groups": 3})
    start(config, tmp_path / "run", direct=False)
    assert digests(tmp_path / "run") == digests(denoised)


@pytest.mark.parametrize("member", ["png", "npy"])
def test_the_page_shows_what_was_written(member: str, digits: Digits, tmp_path: Path) -> None:
    arguments = ["denoise", "--shards", digits.shards()[0], "--dims", "20", "--member", member, "--direct", "--json"]
    found = RUNNER.invoke(app, [*arguments, "--device", "cpu", "--out", str(tmp_path / "run")])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    page = Path(result["report"]).read_text()
    assert page.count("data:image/png") == 2 * 10 + 10  # ten images before and after, ten components
    shard = next(iter(Path(result["shards"]).glob("*.tar")))
    suffixes = {name.rpartition(".")[2] for sample in ShardReader(str(shard)) for name, _ in sample.members}
    assert member in suffixes
    assert result["samples"] == sum(1 for _ in ShardReader(str(shard)))


def test_a_network_is_attacked_image_by_image(network: Path, digits: Digits, tmp_path: Path) -> None:
    arguments = ["robustness", str(network), "--shards", digits.shards()[4], "--n-images", "40", "--direct", "--json"]
    found = RUNNER.invoke(app, [*arguments, "--radius", "2", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    robustness = Robustness.load(tmp_path / "run" / "75-robustness")
    lengths_N = robustness.table()["length"].to_numpy()
    summary = result["summary"]
    assert summary["samples"] == len(lengths_N) == 40
    assert summary["clean_accuracy"] == np.mean(lengths_N > 0) > 0.7
    right_n = lengths_N[lengths_N > 0]
    assert summary["mean"] == pytest.approx(np.minimum(right_n, 2).mean())
    radii, shares = np.array(summary["accuracy"]).T
    assert radii[-1] == 2
    assert (np.diff(shares) <= 0).all()
    assert shares[25] == np.mean(lengths_N > radii[25])
    alpha = np.array(robustness.summary["alpha"])
    assert alpha.shape == (64,)
    assert alpha[-1] == pytest.approx(1)
    assert "Gradient direction" in Path(result["report"]).read_text()


def test_the_lengths_are_those_of_the_samples_they_stand_beside(network: Path, digits: Digits, tmp_path: Path) -> None:
    settings = {"model": str(network), "shards": [digits.shards()[4]], "robustness": {"n_images": 8}}
    config = RobustnessRunConfig.model_validate(settings | {"compute": {"device": "cpu"}})
    start(config, tmp_path / "run", direct=True)
    rows = Robustness.load(tmp_path / "run" / "75-robustness").table().to_pylist()
    model = open_model(str(network))
    images = {
        sample.key: next(data for name, data in sample.members if name.endswith(".png"))
        for sample in ShardReader(digits.shards()[4])
    }
    from sanitize.data.decode import ImageConfig, decode

    image_config = ImageConfig(size=(8, 8), channels=1)
    found_N = smallest_perturbation(
        OnPixels(model.model(), model.config),
        torch.stack([decode(images[row["key"]], image_config) for row in rows]),
        torch.tensor([row["label"] for row in rows]),
        config.robustness.attack.model_copy(update={"random_start": False}),
        config.compute,
    ).tolist()
    assert [row["length"] for row in rows] == pytest.approx(found_N, rel=0.2, abs=0.02)
    assert max(found_N) > 1.5 * min(found_N) + 0.04, "or any order of the rows would do"


@pytest.mark.usefixtures("prefect_server")
def test_attacks_as_prefect_tasks_give_the_same_digests(network: Path, digits: Digits, tmp_path: Path) -> None:
    settings = {"model": str(network), "shards": digits.shards()[4:6], "train_shards": digits.shards()[:2]}
    settings |= {"robustness": {"n_images": 20, "searches": 3}, "compute": {"device": "cpu"}}
    for out, direct, n_groups in (("direct", True, 1), ("prefect", False, 2)):
        config = RobustnessRunConfig.model_validate(settings | {"n_groups": n_groups})
        start(config, tmp_path / out, direct=direct)
    assert digests(tmp_path / "direct") == digests(tmp_path / "prefect")


def test_votes_have_no_gradient(digits: Digits, tmp_path: Path) -> None:
    partition = PartitionConfig.model_validate(
        {"n_partitions": 3, "group_size": 3, "steps_per_epoch": 2, "optim": {"epochs": 1, "batch_size": 16}}
    )
    settings = {"shards": digits.shards()[:2], "index": INDEX, "partition": partition, "compute": {"device": "cpu"}}
    start(TrainRunConfig.model_validate(settings), tmp_path / "ensemble", direct=True)
    arguments = ["robustness", str(tmp_path / "ensemble"), "--shards", digits.shards()[4], "--direct"]
    found = RUNNER.invoke(app, [*arguments, "--device", "cpu", "--out", str(tmp_path / "run")])
    assert found.exit_code == 2
    assert "certify it instead" in " ".join(found.output.split())


def test_a_radius_that_turns_all_images_grey_is_refused() -> None:
    from sanitize.measure import RobustnessConfig

    with pytest.raises(ConfigError, match="turns every image grey"):
        RobustnessConfig(attack=EvasionConfig(norm="linf", radius=3.0))
