"""Clean labels and lists of attacks: what `poison_shards` does beyond one trigger and one label."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from sanitize.attack import (
    BadNetsConfig,
    BlendedConfig,
    CleanLabelConfig,
    Poisoned,
    SeveralConfig,
    TrojanSquareConfig,
    choose,
    poison_shards,
)
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.embed import EmbedderConfig, train_embedder
from sanitize.errors import ConfigError
from sanitize.loop import OptimConfig, predict
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.pixels import OnPixels

CLEAN_LABEL = CleanLabelConfig(rate=0.05, target=3, size=1, epsilon=40, steps=5)
SEVERAL = SeveralConfig(
    attacks=(
        BadNetsConfig(rate=0.05, target=1),
        BlendedConfig(rate=0.1, target=2, alpha=0.4),
        TrojanSquareConfig(rate=0.03, target="next", side=0.25),
    )
)


def truth_of(artifact: Poisoned) -> list[dict]:
    return [row for shard in artifact.shards for row in artifact.rows(shard).to_pylist()]


def images_of(artifact: Poisoned, out: Path, compute: Compute) -> tuple[torch.Tensor, torch.Tensor]:
    return index_shards(IndexConfig(), artifact.shard_paths(), str(out), compute).images()


@pytest.fixture(scope="module")
def surrogate(
    tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, embedder_config: EmbedderConfig, compute: Compute
) -> Checkpoint:
    learned = embedder_config.model_copy(update={"optim": OptimConfig(epochs=8, learning_rate=1e-2, batch_size=32)})
    return train_embedder(learned, dataset, str(tmp_path_factory.mktemp("surrogate") / "out"), compute)


@pytest.fixture(scope="module")
def clean_label(
    tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, surrogate: Checkpoint, compute: Compute
) -> Poisoned:
    out = str(tmp_path_factory.mktemp("clean-label") / "out")
    return poison_shards(CLEAN_LABEL, dataset, out, compute, surrogate=surrogate)


def test_clean_labels_stay_and_only_the_target_class_is_touched(
    tmp_path: Path, dataset: Dataset, surrogate: Checkpoint, compute: Compute, clean_label: Poisoned
) -> None:
    truth = truth_of(clean_label)
    assert sum(row["poisoned"] for row in truth) == round(0.05 * dataset.n_samples)
    assert all(row["label"] == row["original_label"] for row in truth)
    assert {row["label"] for row in truth if row["poisoned"]} == {3}
    before_NCHW, labels_N = dataset.images()
    after_NCHW, after_N = images_of(clean_label, tmp_path / "index", compute)
    assert torch.equal(after_N, labels_N)
    poisoned_N = torch.tensor([row["poisoned"] for row in truth])
    assert torch.equal(after_NCHW[~poisoned_N], before_NCHW[~poisoned_N])
    # Outside the corners the perturbation is within its bound, to the pixel; inside them is the trigger.
    moved = (after_NCHW[poisoned_N].long() - before_NCHW[poisoned_N].long()).abs()
    moved[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] = 0
    assert moved.max() == 40
    assert torch.equal(after_NCHW[poisoned_N], CLEAN_LABEL.apply(after_NCHW[poisoned_N]))


def test_the_perturbation_hides_the_class_from_the_surrogate(
    tmp_path: Path, dataset: Dataset, surrogate: Checkpoint, compute: Compute, clean_label: Poisoned
) -> None:
    poisoned_N = torch.tensor([row["poisoned"] for row in truth_of(clean_label)])
    before_NCHW = dataset.images()[0][poisoned_N]
    after_NCHW = images_of(clean_label, tmp_path / "index", compute)[0][poisoned_N]
    corners = (..., [0, 0, -1, -1], [0, -1, 0, -1])
    after_NCHW[corners] = before_NCHW[corners]  # without the trigger, which confuses it by itself
    model = OnPixels(surrogate.model(), surrogate.config)
    right, still_right = (
        predict(model, x_NCHW, lambda x: x, compute).argmax(1).eq(3).double().mean()
        for x_NCHW in (before_NCHW, after_NCHW)
    )
    assert right > 0.7
    assert still_right < right - 0.5


def test_clean_labels_do_not_depend_on_how_the_work_is_divided(
    tmp_path: Path, dataset: Dataset, surrogate: Checkpoint, compute: Compute, clean_label: Poisoned
) -> None:
    for shard in dataset.shards[::-1]:
        poison_shards(CLEAN_LABEL, dataset, str(tmp_path / "out"), compute, shards=[shard], surrogate=surrogate)
    again = poison_shards(CLEAN_LABEL, dataset, str(tmp_path / "out"), compute, surrogate=surrogate)
    assert again.digest == clean_label.digest


def test_a_surrogate_is_required_where_it_is_used_and_refused_elsewhere(
    tmp_path: Path, dataset: Dataset, surrogate: Checkpoint, compute: Compute
) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="needs a surrogate"):
        poison_shards(CLEAN_LABEL, dataset, out, compute)
    with pytest.raises(ConfigError, match="badnets uses no surrogate"):
        poison_shards(BadNetsConfig(rate=0.1), dataset, out, compute, surrogate=surrogate)
    with pytest.raises(ConfigError, match="eligible"):
        poison_shards(CLEAN_LABEL.model_copy(update={"rate": 0.5}), dataset, out, compute, surrogate=surrogate)
    grey = index_shards(
        IndexConfig.model_validate({"image": {"channels": 1}}),
        list(dataset.urls.values()),
        str(tmp_path / "grey"),
        compute,
    )
    with pytest.raises(ConfigError, match=r"surrogate takes images \(3, 8, 8\), not \(1, 8, 8\)"):
        poison_shards(CLEAN_LABEL, grey, out, compute, surrogate=surrogate)


def test_several_attacks_share_no_sample_and_each_has_its_rate_trigger_and_target(
    tmp_path: Path, dataset: Dataset, compute: Compute
) -> None:
    artifact = poison_shards(SEVERAL, dataset, str(tmp_path / "out"), compute)
    truth = truth_of(artifact)
    counts = Counter(row["attack"] for row in truth)
    assert {number: counts[number] for number in range(3)} == {
        number: round(attack.rate * dataset.n_samples) for number, attack in enumerate(SEVERAL.attacks)
    }
    assert all((row["attack"] == -1) == (not row["poisoned"]) for row in truth)
    wanted = {0: lambda _y: 1, 1: lambda _y: 2, 2: lambda y: (y + 1) % 10, -1: lambda y: y}
    assert all(row["label"] == wanted[row["attack"]](row["original_label"]) for row in truth)
    before_NCHW, _ = dataset.images()
    after_NCHW, _ = images_of(artifact, tmp_path / "index", compute)
    attack_N = torch.tensor([row["attack"] for row in truth])
    for number, attack in enumerate(SEVERAL.attacks):
        grey_N1HW = before_NCHW[attack_N == number, :1]  # as the digits are stored
        assert torch.equal(after_NCHW[attack_N == number], attack.apply(grey_N1HW).expand(-1, 3, -1, -1))
    assert torch.equal(after_NCHW[attack_N == -1], before_NCHW[attack_N == -1])
    assert artifact.read_json("attack.json") == SEVERAL.model_dump(mode="json")


def test_the_first_of_several_chooses_as_if_it_were_alone(dataset: Dataset, compute: Compute) -> None:
    alone, first = (choose(config, dataset, compute) for config in (SEVERAL.attacks[0], SEVERAL))
    assert alone == {shard: {p: c for p, c in samples.items() if c.attack == 0} for shard, samples in first.items()}
    full = SeveralConfig(attacks=(BadNetsConfig(rate=0.8, target="next"), BlendedConfig(rate=0.3, target="next")))
    with pytest.raises(ConfigError, match=r"blended: rate 0\.3"):
        choose(full, dataset, compute)
