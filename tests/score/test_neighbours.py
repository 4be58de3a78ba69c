from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.embed.label_free import oriented_gradients
from sanitize.errors import ConfigError
from sanitize.measure import auroc
from sanitize.score.neighbours import Neighbours, NeighboursConfig
from sanitize.score.scorer import row_hashes
from sanitize.select import FDRRule

CPU = Compute(device="cpu")


def of_rows(**settings: Any) -> NeighboursConfig:
    """Rows without a grid."""
    return NeighboursConfig(embedding="pixels", windows=1, **settings)


def batches(z_ND: Tensor, labels_N: Tensor, size: int = 64, shard: str = "s") -> list[EmbeddingBatch]:
    parts = zip(torch.arange(len(z_ND)).split(size), labels_N.split(size), z_ND.split(size), strict=True)
    return [EmbeddingBatch(shard, at_B, [f"{i:04d}" for i in at_B.tolist()], y_B, z_BD) for at_B, y_B, z_BD in parts]


def fitted(config: NeighboursConfig, of: list[EmbeddingBatch]) -> Neighbours:
    scorer = Neighbours(config)
    scorer.fit(lambda _name: iter(of), CPU)
    return scorer


def scores(scorer: Neighbours, of: list[EmbeddingBatch]) -> Tensor:
    return torch.cat([scorer.score(batch) for batch in of])


def blobs(n: int = 300, n_classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres_KD = 4 * torch.randn(n_classes, 8, generator=generator)
    labels_N = torch.arange(n) % n_classes
    return centres_KD[labels_N] + torch.randn(n, 8, generator=generator), labels_N


def slow_twin(config: NeighboursConfig, z_ND: Tensor, labels_N: Tensor) -> Tensor:
    """The definition, one sample after the other, in float64."""
    centred_ND = z_ND.double() - z_ND.double().mean(0)
    _, singular_D, rows_DD = torch.linalg.svd(centred_ND, full_matrices=False)
    scale_d = (singular_D**2 / (len(z_ND) - 1)) ** (-config.whiten / 2)
    w_Nd = (centred_ND @ rows_DD.T * scale_d)[:, : config.n_components]
    shares = []
    for i, w_d in enumerate(w_Nd):
        cosine_N = (w_Nd @ w_d) / (w_Nd.norm(dim=1) * w_d.norm())
        cosine_N[i] = -torch.inf
        nearest_k = cosine_N.argsort(descending=True)[: config.k]
        shares.append(float((labels_N[nearest_k] != labels_N[i]).double().mean()))
    return torch.tensor(shares)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 20), st.integers(2, 8))
def test_it_is_its_definition(seed: int, whiten: float, k: int, n_components: int) -> None:
    z_ND, labels_N = blobs(120, seed=seed)
    config = of_rows(k=k, whiten=whiten, n_components=n_components, rounds=0)
    found_N = scores(fitted(config, batches(z_ND, labels_N)), batches(z_ND, labels_N))
    # float32 may swap the last neighbour with the one behind it
    assert (found_N - slow_twin(config, z_ND, labels_N)).abs().max() <= 1 / k + 1e-6
    assert (found_N - slow_twin(config, z_ND, labels_N)).abs().mean() <= 0.1 / k


def test_rounds_weigh_each_vote_by_the_share_that_agrees_with_the_voter() -> None:
    z_ND, labels_N = blobs(90)
    labels_N = torch.where(torch.rand(90, generator=torch.Generator().manual_seed(3)) < 0.3, 0, labels_N)
    of = batches(z_ND, labels_N)
    plain_N = slow_twin(of_rows(k=10), z_ND, labels_N)
    centred_ND = z_ND.double() - z_ND.double().mean(0)
    cosine_NN = torch.nn.functional.normalize(centred_ND) @ torch.nn.functional.normalize(centred_ND).T
    wanted = []
    for i, row_N in enumerate(cosine_NN.fill_diagonal_(-torch.inf)):
        near = row_N.argsort(descending=True)[:10].tolist()
        wanted.append(
            sum((1 - plain_N[j]) * (labels_N[j] != labels_N[i]) for j in near) / sum(1 - plain_N[j] for j in near)
        )
    torch.testing.assert_close(
        scores(fitted(of_rows(k=10, rounds=1), of), of), torch.tensor(wanted), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rounds_keep_poison_from_confirming_itself(seed: int) -> None:
    z_ND, true_N = blobs(1500, n_classes=5, seed=seed)
    poisoned_N = (true_N != 0) & (torch.rand(1500, generator=torch.Generator().manual_seed(seed)) < 0.2)
    z_ND[poisoned_N, 0] += 3.0  # a trigger: what makes them alike
    of = batches(z_ND, torch.where(poisoned_N, 0, true_N))
    plain, weighted = (scores(fitted(of_rows(rounds=rounds), of), of) for rounds in (0, 3))
    recalls = [float((s[poisoned_N] > s[~poisoned_N].quantile(0.95)).float().mean()) for s in (plain, weighted)]
    assert recalls[0] < 0.95
    assert recalls[1] > 0.97


def test_flipped_labels_disagree_with_their_neighbours() -> None:
    for seed in range(3):
        z_ND, true_N = blobs(600, seed=seed)
        flipped_N = torch.rand(600, generator=torch.Generator().manual_seed(seed)) < 0.2
        labels_N = torch.where(flipped_N, (true_N + 1) % 3, true_N)
        of = batches(z_ND, labels_N)
        assert auroc(scores(fitted(of_rows(), of), of).numpy(), flipped_N.numpy()) > 0.97


def test_poison_that_is_half_of_its_class_is_separated_from_the_other_half() -> None:
    z_ND, true_N = blobs(900)
    poisoned_N = (true_N != 0) & (torch.rand(900, generator=torch.Generator().manual_seed(0)) < 0.5)
    labels_N = torch.where(poisoned_N, 0, true_N)
    of = batches(z_ND, labels_N)
    scores_N = scores(fitted(of_rows(k=30), of), of)
    in_class_N = labels_N == 0
    assert auroc(scores_N[in_class_N].numpy(), poisoned_N[in_class_N].numpy()) > 0.99


def test_a_constant_added_to_all_rows_changes_nothing() -> None:
    z_ND, labels_N = blobs()
    config = of_rows(whiten=0.5)
    plain_N = scores(fitted(config, batches(z_ND, labels_N)), batches(z_ND, labels_N))
    shifted = batches(z_ND + 8, labels_N)
    assert (scores(fitted(config, shifted), shifted) - plain_N).abs().max() <= 1 / 50 + 1e-6


@pytest.mark.parametrize("size", [1, 7, 300])
def test_batches_and_blocks_do_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z_ND, labels_N = blobs()
    scorer = fitted(of_rows(), batches(z_ND, labels_N))
    whole_N = scores(scorer, batches(z_ND, labels_N, 300))
    monkeypatch.setattr("sanitize.score.neighbours._BLOCK", 1000)
    assert torch.equal(scores(scorer, batches(z_ND, labels_N, size)), whole_N)


def test_the_reference_is_bounded_and_does_not_depend_on_order() -> None:
    z_ND, labels_N = blobs(900)
    of = batches(z_ND, labels_N)
    config = of_rows(max_reference=200, k=10)
    one, other = fitted(config, of), fitted(config, of[::-1])
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], msg=name)
    assert one.state_dict()["reference"].shape == (1, 200, 8)
    flipped = [batch._replace(labels_B=(batch.labels_B + 1) % 3) for batch in of]
    assert scores(one, flipped).mean() > 0.9 > 0.1 > scores(one, of).mean()


def test_a_sample_is_no_neighbour_of_its_own() -> None:
    z_ND, labels_N = blobs(60)
    labels_N = torch.arange(60)  # all labels differ
    of = batches(z_ND, labels_N)
    scorer = fitted(of_rows(k=5, rounds=0), of)
    assert torch.equal(scores(scorer, of), torch.ones(60))
    elsewhere = batches(z_ND, labels_N, shard="another")  # the same rows, but not the same samples
    assert scores(scorer, elsewhere).max() == pytest.approx(0.8)
    assert not set(row_hashes(of[0], 1)) & set(row_hashes(elsewhere[0], 1))


def test_saved_and_loaded_it_scores_the_same_bits() -> None:
    z_ND, labels_N = blobs()
    scorer = fitted(of_rows(), batches(z_ND, labels_N))
    again = Neighbours(of_rows())
    again.load_state({k: v.clone() for k, v in scorer.state_dict().items()}, scorer.statistics)
    assert torch.equal(scores(again, batches(z_ND, labels_N)), scores(scorer, batches(z_ND, labels_N)))


def test_constant_features_duplicates_and_tiny_sets_are_finite() -> None:
    z_ND, labels_N = blobs(40)
    z_ND[:, 3] = 7.0
    z_ND[:20] = z_ND[0]
    for n in (1, 2, 40):
        of = batches(z_ND[:n], labels_N[:n])
        found_N = scores(fitted(of_rows(whiten=1), of), of)
        assert found_N.isfinite().all()
        assert ((found_N >= 0) & (found_N <= 1)).all()


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy bars of four directions, uint8 (N, 1, 28, 28), and which."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(n) % 4
    at = torch.arange(28) - 13.5
    angle_N = labels_N * torch.pi / 4
    along_NHW = at[:, None] * angle_N.cos()[:, None, None] + at * angle_N.sin()[:, None, None]
    bars_NHW = along_NHW.abs() < 3
    noise_NHW = 40 * torch.randn(n, 28, 28, generator=generator)
    return (120 * bars_NHW + 60 + noise_NHW).clamp(0, 255).byte()[:, None], labels_N


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_patch_is_in_few_windows(seed: int) -> None:
    images_NCHW, true_N = images(800, seed)
    poisoned_N = (true_N != 0) & (torch.rand(800, generator=torch.Generator().manual_seed(seed)) < 0.3)
    images_NCHW[poisoned_N, :, -5:, -5:] = torch.tensor([0, 255, 0, 255, 0], dtype=torch.uint8)
    of = batches(oriented_gradients(images_NCHW, 7), torch.where(poisoned_N, 0, true_N))
    whole, windows = (scores(fitted(NeighboursConfig(windows=n), of), of) for n in (1, 3))
    recalls = [float((s[poisoned_N] > s[~poisoned_N].quantile(0.95)).float().mean()) for s in (whole, windows)]
    assert recalls[0] < 0.8
    assert recalls[1] > 0.95


def test_windows_need_a_grid() -> None:
    with pytest.raises(ConfigError, match="of 8 features has no 3 windows a side; set windows: 1"):
        fitted(NeighboursConfig(), batches(*blobs()))


def test_with_windows_too_saved_and_loaded_it_scores_the_same_bits() -> None:
    images_NCHW, labels_N = images(120, 0)
    of = batches(oriented_gradients(images_NCHW, 7), labels_N)
    scorer = fitted(NeighboursConfig(), of)
    again = Neighbours(NeighboursConfig())
    again.load_state({k: v.clone() for k, v in scorer.state_dict().items()}, scorer.statistics)
    assert torch.equal(scores(again, of), scores(scorer, of))
    assert torch.equal(scores(scorer, of), scores(scorer, [b for batch in of for b in halves(batch)]))


def halves(batch: EmbeddingBatch) -> list[EmbeddingBatch]:
    n = len(batch.keys) // 2
    return [EmbeddingBatch(batch.shard, *(column[part] for column in batch[1:])) for part in (slice(n), slice(n, None))]


@pytest.mark.parametrize("seed", range(5))
def test_small_clean_classes_and_rare_labels_lose_nothing_to_the_default_rule(seed: int) -> None:
    """Classes of 40, fewer than the neighbours asked for, and classes of one to three samples."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.cat([torch.arange(9).repeat(40), torch.tensor([10, 11, 11, 12, 12, 12, 17])])
    centres_KD = 4 * torch.randn(18, 8, generator=generator)
    z_ND = centres_KD[labels_N] + torch.randn(len(labels_N), 8, generator=generator) * 0.3
    halves = (labels_N == 3) & (torch.arange(len(labels_N)) % 18 < 9)  # a class of two styles
    z_ND[halves] += 0.5
    rows = batches(z_ND, labels_N)
    scorer = fitted(of_rows(), rows)
    s_N = scores(scorer, rows).numpy()
    by_class = {y: s_N[labels_N.numpy() == y] for y in labels_N.unique().tolist()}
    thresholds = FDRRule().build()(by_class, scorer.statistics).thresholds
    removed = {y: int((s_n > thresholds[y]).sum()) for y, s_n in by_class.items()}
    assert sum(removed.values()) <= 1, removed
