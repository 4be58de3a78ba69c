"""The given-label margin is that of scikit-learn's ridge, out of fold; the order of shards is nothing to it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.measure import auroc
from sanitize.score.label_margin import LabelMargin, LabelMarginConfig, LeastSquares
from sanitize.score.scorer import row_hashes

CPU = Compute(device="cpu")


def blobs(n: int = 300, n_classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres_KD = 3 * torch.randn(n_classes, 8, generator=generator)
    labels_N = torch.arange(n) % n_classes
    return centres_KD[labels_N] + torch.randn(n, 8, generator=generator), labels_N


def batches(z_ND: Tensor, labels_N: Tensor, size: int = 64) -> list[EmbeddingBatch]:
    whole = EmbeddingBatch("s", torch.arange(len(z_ND)), [f"{i:04d}" for i in range(len(z_ND))], labels_N, z_ND)
    return [whole.take(rows.tolist()) for rows in torch.arange(len(z_ND)).split(size)]


def fitted(config: LabelMarginConfig, of: list[EmbeddingBatch]) -> LabelMargin:
    scorer = LabelMargin(config)
    scorer.fit(lambda _name: iter(of), CPU)
    return scorer


def scores(scorer: LabelMargin, of: list[EmbeddingBatch]) -> Tensor:
    return torch.cat([scorer.score(batch) for batch in of])


def slow_twin(config: LabelMarginConfig, of: list[EmbeddingBatch]) -> np.ndarray:
    """scikit-learn's Ridge of all folds but one, fold by fold."""
    seed = CPU.seed_for("score", "label_margin", "folds")
    fold_N = np.array([value % config.n_folds for batch in of for value in row_hashes(batch, seed)])
    z_ND = torch.cat([batch.z_BD for batch in of]).double().numpy()
    labels_N = torch.cat([batch.labels_B for batch in of]).numpy()
    onehot_NK = (labels_N[:, None] == np.unique(labels_N)).astype(float)
    margins_N = np.zeros(len(z_ND))
    for fold in np.unique(fold_N):
        inside_N = fold_N == fold
        rest_MD = z_ND[~inside_N]
        alpha = config.ridge * rest_MD.var(0).sum() * len(rest_MD) / z_ND.shape[1]
        predictions_NK = Ridge(alpha=alpha).fit(rest_MD, onehot_NK[~inside_N]).predict(z_ND[inside_N])
        own_NK = onehot_NK[inside_N] == 1
        margins_N[inside_N] = np.where(own_NK, -np.inf, predictions_NK).max(1) - predictions_NK[own_NK]
    return margins_N


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 7), st.floats(1e-4, 10), st.integers(2, 5), st.sampled_from([0.0, 100.0]))
def test_it_is_scikit_learns_ridge_out_of_fold(
    seed: int, n_folds: int, ridge: float, n_classes: int, offset: float
) -> None:
    z_ND, labels_N = blobs(120, n_classes, seed)
    of = batches(z_ND + offset, 10 + 3 * labels_N)
    config = LabelMarginConfig(n_folds=n_folds, ridge=ridge)
    np.testing.assert_allclose(scores(fitted(config, of), of).numpy(), slow_twin(config, of), rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(5)), st.integers(1, 4))
def test_merging_in_any_order_is_one_pass(seed: int, order: list[int], n_left: int) -> None:
    z_ND, labels_N = blobs(100, 4, seed)
    whole, left, right = LeastSquares(8), LeastSquares(8), LeastSquares(8)
    whole.update(z_ND, labels_N)
    parts = list(zip(z_ND.split(20), labels_N.split(20), strict=True))
    for turn, i in enumerate(order):
        (left if turn < n_left else right).update(*parts[i])
    left.merge(right)
    labels = [0, 1, 2, 3, 99]
    torch.testing.assert_close(left.solve(0.1, labels), whole.solve(0.1, labels), rtol=1e-9, atol=1e-12)
    assert (whole.solve(0.1, labels)[:, 4] == 0).all()


def test_a_sample_has_no_say_in_its_own_score() -> None:
    z_ND, labels_N = blobs(200)
    of = batches(z_ND, labels_N)
    z_ND[7], labels_N[7] = 1e3, 2
    moved = fitted(LabelMarginConfig(), batches(z_ND, labels_N))
    again, before = scores(moved, of), scores(fitted(LabelMarginConfig(), of), of)
    assert again[7] == pytest.approx(float(before[7]), abs=1e-6)
    assert (again - before).abs().median() > 0.01


def test_wrong_labels_stand_out() -> None:
    for seed in range(3):
        z_ND, true_N = blobs(600, seed=seed)
        flipped_N = torch.rand(600, generator=torch.Generator().manual_seed(seed)) < 0.2
        of = batches(z_ND, torch.where(flipped_N, (true_N + 1) % 3, true_N))
        assert auroc(scores(fitted(LabelMarginConfig(), of), of).numpy(), flipped_N.numpy()) > 0.97


def test_order_and_batches_do_not_matter() -> None:
    z_ND, labels_N = blobs()
    of = batches(z_ND, labels_N)
    one, other = fitted(LabelMarginConfig(), of), fitted(LabelMarginConfig(), batches(z_ND, labels_N, 7)[::-1])
    torch.testing.assert_close(scores(one, of), scores(other, of), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores(one, batches(z_ND, labels_N, 1)), scores(one, of), rtol=1e-6, atol=1e-7)


def test_class_statistics_are_out_of_fold_means() -> None:
    """Of two labels, a margin is 1 - 2 x the prediction of the given one: predictions add up to 1."""
    z_ND, labels_N = blobs(n_classes=2)
    of = batches(z_ND, labels_N)
    scorer = fitted(LabelMarginConfig(), of)
    for label, said in scorer.statistics.items():
        margins = scores(scorer, of)[labels_N == label]
        assert said["n"] == len(margins)
        assert 1 - 2 * said["mean_prediction"] == pytest.approx(float(margins.mean()), abs=1e-5)


def test_saved_and_loaded_it_scores_the_same_bits() -> None:
    of = batches(*blobs())
    scorer = fitted(LabelMarginConfig(), of)
    again = LabelMargin(LabelMarginConfig())
    again.load_state({k: v.clone() for k, v in scorer.state_dict().items()}, scorer.statistics)
    assert torch.equal(scores(again, of), scores(scorer, of))


def test_constant_features_unknown_labels_and_tiny_sets_are_finite() -> None:
    z_ND, labels_N = blobs(40)
    z_ND[:, 3] = 7.0
    for n, constant in ((1, False), (2, False), (5, False), (40, False), (40, True)):
        rows_ND = torch.ones(n, 8) if constant else z_ND[:n]
        scorer = fitted(LabelMarginConfig(), batches(rows_ND, labels_N[:n]))
        assert scores(scorer, batches(rows_ND, labels_N[:n] + 1)).isfinite().all()
    assert (
        scores(fitted(LabelMarginConfig(), batches(z_ND, torch.zeros(40).long())), batches(z_ND, labels_N)) == 0
    ).all()
    assert (scores(LabelMargin(LabelMarginConfig()), batches(z_ND, labels_N)) == 0).all()
