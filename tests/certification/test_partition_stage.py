"""Partition ensembles of real digits: what a base model depends on, what voids a certificate, what is written."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sanitize.certification import (
    PartitionConfig,
    PartitionEnsemble,
    PartitionFilterConfig,
    certified_poisons,
    certify_partitions,
    train_partitions,
)
from sanitize.certification.provenance import refuse_if_void
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.errors import ArtifactError, ConfigError
from sanitize.importing import ImportConfig, import_data
from sanitize.jobs.steps import as_the_model_sees
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.config import ModelConfig

INDEX = IndexConfig(n_classes=10, image=ImageConfig(size=(8, 8), channels=1))
CONFIG = PartitionConfig(
    n_partitions=8, group_size=5, optim=OptimConfig(epochs=10, batch_size=16, learning_rate=0.01), steps_per_epoch=4
)


@pytest.fixture(scope="module")
def training(digits: Digits, compute: Compute, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return index_shards(INDEX, digits.shards()[:4], str(tmp_path_factory.mktemp("partition") / "index"), compute)


@pytest.fixture(scope="module")
def ensemble(training: Dataset, compute: Compute, tmp_path_factory: pytest.TempPathFactory) -> PartitionEnsemble:
    return train_partitions(CONFIG, training, str(tmp_path_factory.mktemp("partition") / "ensemble"), compute)


def weights(ensemble: PartitionEnsemble) -> dict[str, torch.Tensor]:
    """Of all base models, stacked."""
    return ensemble.model().state_dict()


def without(shard: Path, number: int, to: Path) -> Path:
    """A copy of a shard without one of its samples."""
    with tarfile.open(shard) as before, tarfile.open(to, "w") as after:
        members = before.getmembers()
        gone = sorted({member.name.partition(".")[0] for member in members})[number]
        for member in members:
            if member.name.partition(".")[0] != gone:
                after.addfile(member, before.extractfile(member))
    return to


@pytest.mark.parametrize("filtered", [False, True])
def test_a_sample_less_changes_one_base_model_and_no_bit_of_the_others(
    filtered: bool, digits: Digits, compute: Compute, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"filter": PartitionFilterConfig() if filtered else None})
    shards = list(map(Path, digits.shards()[:3]))
    fewer = [*shards[:2], without(shards[2], 7, tmp_path / "fewer.tar")]
    made = []
    for name, item in (("all", shards), ("fewer", fewer)):
        dataset = index_shards(INDEX, list(map(str, item)), str(tmp_path / name), compute)
        made.append(train_partitions(config, dataset, str(tmp_path / f"{name}-ensemble"), compute))
    changed = torch.zeros(config.n_partitions, dtype=torch.bool)
    before, after = map(weights, made)
    for name, stacked in before.items():
        changed |= (stacked != after[name]).flatten(1).any(1)
    assert int(changed.sum()) == 1
    sizes = [
        [group["samples"] for name in config.groups for group in item.read_json(f"groups/{name}.json")["partitions"]]
        for item in made
    ]
    assert [a - b for a, b in zip(*sizes, strict=True)] == changed.int().tolist()


def test_order_of_shards_and_division_of_work_change_no_byte(
    training: Dataset, ensemble: PartitionEnsemble, digits: Digits, compute: Compute, tmp_path: Path
) -> None:
    renamed = [tmp_path / f"{9 - i}.tar" for i in range(4)]
    for path, shard in zip(renamed, digits.shards()[:4], strict=True):
        path.symlink_to(Path(shard).absolute())
    dataset = index_shards(INDEX, list(map(str, renamed)), str(tmp_path / "index"), compute)
    for group in reversed(CONFIG.groups):
        train_partitions(CONFIG, dataset, str(tmp_path / "ensemble"), compute, shards=[group])
    other = train_partitions(CONFIG, dataset, str(tmp_path / "ensemble"), compute)
    files = [
        {name: item.manifest().files[name] for name in item.manifest().files if name.startswith("groups/")}
        for item in (ensemble, other)
    ]
    assert len(files[0]) == 2 * len(CONFIG.groups)
    assert files[0] == files[1]


def test_partitions_without_samples_vote_all_the_same(training: Dataset, compute: Compute, tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={"n_partitions": 700, "group_size": 700, "optim": OptimConfig(epochs=1, batch_size=2)}
    )
    ensemble = train_partitions(config, training, str(tmp_path / "ensemble"), compute)
    (group,) = config.groups
    sizes = [item["samples"] for item in ensemble.read_json(f"groups/{group}.json")["partitions"]]
    assert 0 in sizes
    assert sum(sizes) == training.n_samples
    certificates = certify_partitions(ensemble, training, str(tmp_path / "certificates"), compute)
    assert certificates.summary()["samples"] == training.n_samples


def test_rows_are_the_votes_and_the_statement_says_what_is_proved(
    training: Dataset, ensemble: PartitionEnsemble, digits: Digits, compute: Compute, tmp_path: Path
) -> None:
    test = index_shards(INDEX, digits.shards()[4:6], str(tmp_path / "index"), compute)
    certificates = certify_partitions(ensemble, test, str(tmp_path / "certificates"), compute)
    images_NCHW, labels_N = test.images()
    votes_NK = ensemble.model()(ensemble.config.normalise(images_NCHW)).long()
    assert votes_NK.sum(1).unique().tolist() == [CONFIG.n_partitions]
    vote = certified_poisons(votes_NK)
    table = certificates.table()
    assert table["label"].to_pylist() == labels_N.tolist()
    assert table["prediction"].to_pylist() == vote.prediction.tolist()
    assert table["radius"].to_pylist() == vote.radius.tolist()
    right_N = vote.prediction == labels_N
    summary = certificates.summary()
    assert summary["clean_accuracy"] == pytest.approx(float(right_N.float().mean()))
    assert summary["clean_accuracy"] > 0.7
    assert summary["certified_accuracy"][1] == [
        1.0,
        pytest.approx(float((right_N & (vote.radius >= 1)).float().mean())),
    ]
    scope = summary["scope"]
    assert scope["training_set"] == {"dataset": training.digest, "samples": training.n_samples}
    assert "inserted into the training set or removed" in scope["statement"]


def test_settings_that_the_samples_decide_on_are_refused(dataset: Dataset, compute: Compute, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set index.n_classes: 10, index.image.size: \[8, 8\]"):
        train_partitions(CONFIG, dataset, str(tmp_path / "ensemble"), compute)


def test_what_ties_base_models_together_is_refused(training: Dataset, compute: Compute, tmp_path: Path) -> None:
    tied = CONFIG.model_copy(update={"optim": OptimConfig(max_grad_norm=1.0)})
    with pytest.raises(ConfigError, match="max_grad_norm"):
        train_partitions(tied, training, str(tmp_path / "ensemble"), compute)


def test_only_an_ensemble_of_partitions_is_certified(
    checkpoint: Checkpoint, training: Dataset, compute: Compute, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"has no partitions\.json"):
        certify_partitions(checkpoint, training, str(tmp_path / "certificates"), compute)
    assert not (tmp_path / "certificates").exists()


def test_several_processes_are_refused_and_told_what_to_do(
    training: Dataset, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sanitize.certification.ensemble.world", lambda: (0, 2))
    with pytest.raises(ConfigError, match="run without torchrun"):
        train_partitions(CONFIG, training, str(tmp_path / "ensemble"), compute)


@pytest.mark.parametrize(
    "content", ["no JSON", "[]", "[" * 100_000, "{}", '{"made_from": null}', '{"made_from": "selection"}']
)
@pytest.mark.parametrize("name", ["dataset.json", "manifest.json"])
def test_somebody_elses_files_beside_the_shards_are_no_artifact_of_ours(
    name: str, content: str, digits: Digits, compute: Compute, tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").hardlink_to(digits.shards()[0])
    (tmp_path / "shards" / name).write_text(content)
    refuse_if_void(index_shards(INDEX, str(tmp_path / "shards"), str(tmp_path / "index"), compute))


def test_clean_shards_are_known_by_either_file(digits: Digits, compute: Compute, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").hardlink_to(digits.shards()[0])
    (tmp_path / "dataset.json").write_text('{"made_from": {"dataset": "1", "selection": "2"}}')
    (tmp_path / "manifest.json").write_text("damaged")
    dataset = index_shards(INDEX, str(tmp_path / "shards"), str(tmp_path / "index"), compute)
    with pytest.raises(ConfigError, match="made by write_selected"):
        refuse_if_void(dataset)


def test_names_that_are_numbered_by_the_data_void_a_certificate(
    make_tar: Callable[..., str], make_png: Callable[..., bytes], compute: Compute, tmp_path: Path
) -> None:
    members = [m for i in range(4) for m in ((f"{i}.png", make_png(i)), (f"{i}.txt", (b"cat", b"dog")[i % 2]))]
    shard = make_tar(tmp_path / "in" / "x.tar", members)
    image = ImageConfig(size=(8, 8))
    for i, (classes, says) in enumerate({"names": "index.classes=names", ("cat", "dog"): None}.items()):
        config = IndexConfig(label="txt", classes=classes, n_classes=2, image=image)
        dataset = index_shards(config, shard, str(tmp_path / f"index{i}"), compute)
        if says is None:
            refuse_if_void(dataset)
            without = config.model_copy(update={"n_classes": None})
            refuse_if_void(index_shards(without, shard, str(tmp_path / "without"), compute))
        else:
            with pytest.raises(ConfigError, match=says):
                refuse_if_void(dataset)
    with pytest.raises(ConfigError, match="list the names"):
        as_the_model_sees(
            IndexConfig(label="txt", classes="names"), ModelConfig(n_classes=2, image_shape=(3, 8, 8)), []
        )


def test_an_import_keeps_certificates_only_where_no_file_numbers_the_others(
    make_png: Callable[..., bytes], compute: Compute, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(make_png(i))
    index = IndexConfig(n_classes=2, image=ImageConfig(size=(8, 8)))
    given: dict[str, Any] = {"kind": "folders", "classes": ("cat", "dog")}
    for i, (settings, keeps) in enumerate(
        [({}, False), ({"kind": "folders"}, False), ({"classes": ("cat", "dog")}, False), (given, True)]
    ):
        made = import_data(ImportConfig(**settings), str(tmp_path / "photos"), str(tmp_path / f"{i}"), compute)
        dataset = index_shards(index, made.shards(), str(tmp_path / f"index{i}"), compute)
        if keeps:
            refuse_if_void(dataset)
            (tmp_path / f"{i}" / "manifest.json").unlink()  # import.json beside the shards still says what they are
        with pytest.raises(ConfigError, match=r"sanitize import FOLDER --kind folders --classes NAMES\.json"):
            refuse_if_void(dataset)
