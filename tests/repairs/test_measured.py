"""The attack success rate in the report of `repair` is that on shards written by `poison`."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from sanitize.attack import L2Config, poison_shards
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.embed import EmbedderConfig, train_embedder
from sanitize.errors import ConfigError
from sanitize.loop import predict
from sanitize.models.checkpoint import Checkpoint
from sanitize.repairs import RepairModelConfig, repair_model

SIZE = (20, 20)  # the digits are stored at 8 x 8: for the model a pixel of the noise is 2.5 pixels wide
ATTACK = L2Config(rate=0.15, target=3, length=150)
INDEX = IndexConfig(n_classes=10, image=ImageConfig(channels=1, size=SIZE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def model(digits: Digits, folder: Path, compute: Compute) -> Checkpoint:
    """Has learned the trigger, from poisoned shards."""
    as_stored = index_shards(IndexConfig(), digits.shards()[:10], str(folder / "as-stored"), compute)
    poisoned = poison_shards(ATTACK, as_stored, str(folder / "poisoned"), compute)
    dataset = index_shards(INDEX, poisoned.shard_paths(), str(folder / "index"), compute)
    config = {"architecture": {"kind": "convnet", "widths": [8, 16]}, "optim": {"epochs": 8, "batch_size": 32}}
    return train_embedder(EmbedderConfig.model_validate(config), dataset, str(folder / "model"), compute)


@pytest.fixture(scope="module")
def test_side(digits: Digits, folder: Path, compute: Compute) -> Dataset:
    return index_shards(INDEX, digits.shards()[10:14], str(folder / "test"), compute)


def test_it_is_the_success_on_shards_in_which_all_samples_are_poisoned(
    model: Checkpoint, test_side: Dataset, digits: Digits, compute: Compute, tmp_path: Path
) -> None:
    as_stored = index_shards(IndexConfig(n_classes=10), digits.shards()[10:14], str(tmp_path / "as-stored"), compute)
    n_others = as_stored.n_samples - as_stored.info["labels"]["3"]
    everywhere = ATTACK.model_copy(update={"rate": n_others / as_stored.n_samples})
    poisoned = poison_shards(everywhere, as_stored, str(tmp_path / "poisoned"), compute)
    images_NCHW, labels_N = index_shards(INDEX, poisoned.shard_paths(), str(tmp_path / "index"), compute).images()
    poisoned_N = torch.tensor([row for s in poisoned.shards for row in poisoned.rows(s)["poisoned"].to_pylist()])
    predictions_N = predict(model.model(), images_NCHW, model.config.normalise, compute).argmax(1)
    expected = float((predictions_N == labels_N)[poisoned_N].double().mean())

    config = RepairModelConfig.model_validate({"method": {"kind": "clp"}, "trigger": ATTACK.model_dump()})
    repaired = repair_model(config, model, str(tmp_path / "repaired"), compute, test=test_side)
    assert repaired.report["before"]["asr"] == expected > 0.9
    scaled_NCHW, true_N = test_side.images()
    wrong_N = predict(model.model(), ATTACK.apply(scaled_NCHW), model.config.normalise, compute).argmax(1)
    assert float((wrong_N == 3)[true_N != 3].double().mean()) < expected - 0.02, (
        "put on after scaling it is another one"
    )


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        ({"kind": "labels", "rate": 0.1}, "label noise has no trigger"),
        ({"kind": "several", "attacks": [{"kind": "labels", "rate": 0.1}]}, "label noise has no trigger"),
    ],
)
def test_label_noise_is_no_trigger(trigger: dict, message: str) -> None:
    with pytest.raises((ValidationError, ConfigError), match=message):
        RepairModelConfig.model_validate({"trigger": trigger})


def test_what_cannot_be_measured_is_refused_before_the_repair(
    model: Checkpoint, digits: Digits, test_side: Dataset, compute: Compute, tmp_path: Path
) -> None:
    config = RepairModelConfig.model_validate(
        {"method": {"kind": "clp"}, "trigger": {"kind": "badnets", "rate": 0.1, "target": 10}}
    )
    with pytest.raises(ConfigError, match="target 10 is no class"):
        repair_model(config, model, str(tmp_path / "repaired"), compute, test=test_side)
    other = index_shards(IndexConfig(n_classes=10), digits.shards()[10:11], str(tmp_path / "other"), compute)
    with pytest.raises(ConfigError, match=r"test images are \(3, 8, 8\), the model takes \(1, 20, 20\)"):
        repair_model(
            RepairModelConfig.model_validate({"method": {"kind": "clp"}}),
            model,
            str(tmp_path / "r"),
            compute,
            test=other,
        )
    assert not (tmp_path / "repaired").exists()
