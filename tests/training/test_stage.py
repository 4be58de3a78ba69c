"""The training stage: what it writes, what it resumes, and whom it suspects."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sanitize.artifacts import verify
from sanitize.attack import LabelNoiseConfig, Poisoned, poison_shards
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.denoising import PCAConfig, PCANoiseConfig, fit_pca
from sanitize.errors import ConfigError, NumericsError
from sanitize.loop import OptimConfig, predict
from sanitize.measure import accuracy, auroc
from sanitize.models.convnet import ConvNetConfig
from sanitize.select import ContaminationRule, SelectConfig, select_samples
from sanitize.training import (
    DropScorerConfig,
    MethodConfig,
    RobustModel,
    SelectBatchConfig,
    TrainConfig,
    drop_scores,
    train_robust,
    zoo,
)
from tests.killed import kill_after_snapshot

SMALL = TrainConfig(
    architecture=ConvNetConfig(widths=(8, 16)), optim=OptimConfig(epochs=4, batch_size=32, learning_rate=0.02)
)


def small(name: str, **more: object) -> TrainConfig:
    return SMALL.model_copy(update={"method": zoo(tau=0.25, warmup_epochs=1)[name], **more})


@pytest.fixture(scope="module")
def noisy(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> tuple[Dataset, Poisoned]:
    """The digits with 20 % of the labels changed."""
    out = tmp_path_factory.mktemp("noisy")
    poisoned = poison_shards(LabelNoiseConfig(rate=0.2), dataset, str(out / "poisoned"), compute)
    return index_shards(IndexConfig(n_classes=10), poisoned.shard_paths(), str(out / "index"), compute), poisoned


@pytest.fixture(scope="module")
def trained(noisy: tuple[Dataset, Poisoned], tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> RobustModel:
    config = small("prl_l", architecture=ConvNetConfig(widths=(16, 32)), optim=OptimConfig(epochs=20, batch_size=32))
    out = tmp_path_factory.mktemp("trained") / "model"
    return train_robust(config, noisy[0], str(out), compute, test=noisy[0])


def test_it_writes_a_model_a_history_and_how_often_each_sample_was_dropped(
    trained: RobustModel, noisy: tuple[Dataset, Poisoned], compute: Compute
) -> None:
    dataset, _ = noisy
    assert verify(trained.path) == []
    images_NCHW, labels_N = dataset.images()
    logits_NK = predict(trained.model(), images_NCHW, trained.config.normalise, compute)
    assert [row["epoch"] for row in trained.history] == list(range(1, 21))
    assert trained.history[-1]["test_accuracy"] == pytest.approx(accuracy(logits_NK, labels_N))
    assert trained.history[-1]["dropped"] == pytest.approx(0.25, abs=0.01)
    dropped_N, seen_N = trained.drops()
    n_steps = len(labels_N) // 32
    assert len(dropped_N) == dataset.n_samples
    assert int(seen_N.sum()) == 19 * n_steps * 32  # the first epoch is the warm-up
    assert int(dropped_N.sum()) == 19 * n_steps * 8


def test_the_samples_it_dropped_are_those_with_wrong_labels(
    trained: RobustModel, noisy: tuple[Dataset, Poisoned], compute: Compute, tmp_path: Path
) -> None:
    dataset, poisoned = noisy
    scores = drop_scores(DropScorerConfig(), trained, dataset, str(tmp_path / "scores"), compute)
    score_N = np.concatenate([scores.rows(s)["score"].to_numpy() for s in scores.shards])
    wrong_N = np.concatenate([np.array(poisoned.rows(s)["poisoned"].to_pylist()) for s in poisoned.shards])
    assert auroc(score_N, wrong_N) > 0.85
    assert (score_N > 0).all()
    rule = SelectConfig(rule=ContaminationRule(rate=0.2, factor=1))
    selection = select_samples(rule, dataset, [scores], str(tmp_path / "selection"), compute)
    removed_N = ~np.concatenate([np.array(selection.rows(s)["keep"].to_pylist()) for s in selection.shards])
    assert wrong_N[removed_N].mean() > 0.6


def test_drops_are_about_the_data_the_model_was_trained_on(
    trained: RobustModel, dataset: Dataset, compute: Compute, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="was not trained on"):
        drop_scores(DropScorerConfig(), trained, dataset, str(tmp_path / "scores"), compute)
    plain = train_robust(small("standard"), dataset, str(tmp_path / "plain"), compute)
    with pytest.raises(ConfigError, match=r"without dropping samples: set train\.method\.select_batch"):
        drop_scores(DropScorerConfig(), plain, dataset, str(tmp_path / "scores"), compute)


@pytest.mark.parametrize("name", ["prl_g", "co_prl_l", "bootstrap", "prl_at", "decouple"])
def test_every_kind_of_method_ends_in_a_model_that_loads(
    name: str, dataset: Dataset, compute: Compute, tmp_path: Path
) -> None:
    model = train_robust(small(name), dataset, str(tmp_path / "model"), compute)
    assert model.config.group_norm == (name == "prl_g")
    images_NCHW, labels_N = dataset.images()
    learned = accuracy(predict(model.model(), images_NCHW, model.config.normalise, compute), labels_N)
    assert learned == pytest.approx(model.history[-1]["accuracy"], abs=0.05)  # of the last epoch, in training mode
    assert learned > 0.3


def test_a_data_set_that_is_streamed_trains_as_well(dataset: Dataset, compute: Compute, tmp_path: Path) -> None:
    config = small("prl_l", cache_bytes=3 * 8 * 8 * 100)
    model = train_robust(config, dataset, str(tmp_path / "model"), compute, test=dataset)
    assert model.history[-1]["accuracy"] > 0.5
    images_NCHW, labels_N = dataset.images()
    logits_NK = predict(model.model(), images_NCHW, model.config.normalise, compute)
    assert model.history[-1]["test_accuracy"] == pytest.approx(accuracy(logits_NK, labels_N))
    assert model.manifest().recipe.config["buffer_bytes"] == config.cache_bytes  # what is drawn depends on it
    _, seen_N = model.drops()
    assert int(seen_N.max()) <= 3
    assert (seen_N > 0).float().mean() > 0.9


def test_a_loss_that_is_not_finite_names_shard_and_key(dataset: Dataset, compute: Compute, tmp_path: Path) -> None:
    config = small("standard", optim=OptimConfig(optimizer="sgd", learning_rate=1e30, epochs=2, batch_size=32))
    with pytest.raises(NumericsError, match=r"epoch 1, step \d+ \(samples digits-\d{4}\.tar/digit-\d+, .*lower"):
        train_robust(config, dataset, str(tmp_path / "model"), compute)
    assert not (tmp_path / "model").exists()


def test_a_method_for_regression_is_refused(dataset: Dataset, compute: Compute, tmp_path: Path) -> None:
    method = MethodConfig(loss="squared", select_batch=SelectBatchConfig())
    with pytest.raises(ConfigError, match="shards have class labels; set cross_entropy"):
        train_robust(SMALL.model_copy(update={"method": method}), dataset, str(tmp_path / "model"), compute)


TRAIN = """
from sanitize.training import TrainConfig, train_robust
train_robust(TrainConfig.model_validate_json(config), dataset, out, compute)
"""


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_killed_run_goes_on_to_the_same_digest(n: int, dataset: Dataset, compute: Compute, tmp_path: Path) -> None:
    config = small("co_prl_l", snapshot_every=4)
    wanted = train_robust(config, dataset, str(tmp_path / "wanted"), compute)
    out = tmp_path / "model"
    kill_after_snapshot(n, TRAIN, dataset, config, out)
    assert (tmp_path / ".model.partial" / "snapshot").exists()
    model = train_robust(config, dataset, str(out), compute)
    assert model.digest == wanted.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "wanted"]
    assert torch.equal(model.drops()[0], wanted.drops()[0])


def test_snapshots_and_memory_are_no_part_of_the_recipe(dataset: Dataset, compute: Compute, tmp_path: Path) -> None:
    first = train_robust(small("spl"), dataset, str(tmp_path / "a"), compute)
    other = small("spl", snapshot_every=3, cache_bytes=2**25)
    assert train_robust(other, dataset, str(tmp_path / "b"), compute).digest == first.digest


def test_denoised_images_train_and_their_pca_is_needed(dataset: Dataset, compute: Compute, tmp_path: Path) -> None:
    pca = fit_pca(PCAConfig(), dataset, str(tmp_path / "pca"), compute)
    config = small("standard", denoise=PCANoiseConfig(dims=20, noise_dims=5, scale=2.0))
    with pytest.raises(ConfigError, match="needs the PCA"):
        train_robust(config, dataset, str(tmp_path / "without"), compute)
    model = train_robust(config, dataset, str(tmp_path / "model"), compute, test=dataset, pca=pca)
    assert model.history[-1]["test_accuracy"] > 0.5
    assert model.manifest().recipe.inputs["pca"] == pca.digest
    plain = train_robust(small("standard"), dataset, str(tmp_path / "plain"), compute, test=dataset)
    assert plain.history[-1] != model.history[-1]


# Logits of centres 10 long are 100 apart: TRADES would rather give the same answer always than risk such a divergence.
@pytest.mark.parametrize(("name", "scale"), [("prl_l", 10.0), ("trades", 2.0)])
def test_mmc_is_a_loss_like_any_other(
    name: str, scale: float, dataset: Dataset, compute: Compute, tmp_path: Path
) -> None:
    config = small(name, mmc_scale=scale)
    config = config.model_copy(update={"method": config.method.model_copy(update={"loss": "mmc"})})
    model = train_robust(config, dataset, str(tmp_path / "model"), compute, test=dataset)
    assert model.history[-1]["test_accuracy"] > 0.5
    assert model.config.mmc == scale
    images_NCHW, labels_N = dataset.images()
    logits_NK = predict(model.model(), images_NCHW, model.config.normalise, compute)
    assert model.history[-1]["test_accuracy"] == pytest.approx(accuracy(logits_NK, labels_N))
