from collections.abc import Callable, Iterable

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.measure import auroc
from sanitize.score import SpectralConfig, ToxicDirectionConfig
from sanitize.score.scorer import Scorer
from sanitize.score.spectral import quantum_entropy_root, robust_whitening

Batches = list[EmbeddingBatch]
InBatches = Callable[..., Batches]

PLAIN, ROBUST = SpectralConfig(), SpectralConfig(whiten="robust", n_components=8)
ALL_SCORERS = {
    "spectral": PLAIN,
    "spectral, 3 directions": SpectralConfig(n_directions=3),
    "spectral, robust": ROBUST,
    "toxic direction": ToxicDirectionConfig(n_starts=32, evidence=None),
}
every_scorer = pytest.mark.parametrize("config", ALL_SCORERS.values(), ids=ALL_SCORERS.keys())


def fitted(config, batches: Batches, compute: Compute) -> Scorer:  # type: ignore[no-untyped-def]
    scorer = config.build()
    scorer.fit(lambda _name: iter(batches), compute)
    return scorer


def scores_of(scorer: Scorer, batches: Iterable[EmbeddingBatch]) -> Tensor:
    """Scores in the order of positions."""
    pairs = [(int(p), float(s)) for b in batches for p, s in zip(b.positions_B, scorer.score(b), strict=True)]
    return torch.tensor([score for _, score in sorted(pairs)], dtype=torch.float64)


def two_classes(n: int = 300, d: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two Gaussian classes with different means and covariances."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(n) % 2
    z_ND = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.5, d, dtype=torch.float64)
    return z_ND * (1 + labels_N[:, None]) + 3 * labels_N[:, None], labels_N


def planted(seed: int, n: int = 1000, d: int = 32, n_poisoned: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """One class that varies most along its first axes, and 3 % of it tightly together far along a quiet one."""
    generator = torch.Generator().manual_seed(seed)
    spread_D = torch.full((d,), 1.0)
    spread_D[:4] = 5.0
    z_ND = torch.randn(n, d, generator=generator) * spread_D
    poisoned_N = torch.zeros(n, dtype=torch.bool)
    poisoned_N[torch.randperm(n, generator=generator)[:n_poisoned]] = True
    z_ND[poisoned_N, 10] = 7 + 0.2 * torch.randn(n_poisoned, generator=generator)
    return z_ND, torch.zeros(n, dtype=torch.int64), poisoned_N


# --- the paper's score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_plain_scores_are_those_of_an_svd_of_the_centred_matrix(
    in_batches: InBatches, compute: Compute, k: int
) -> None:
    z_ND, labels_N = two_classes()
    batches = in_batches(z_ND, labels_N)
    scores_N = scores_of(fitted(SpectralConfig(n_directions=k), batches, compute), batches)
    for label in (0, 1):
        of_class = z_ND[labels_N == label].float().double()
        centred = of_class - of_class.mean(0)
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[:k]
        wanted = (centred @ directions.T).square().sum(1)
        torch.testing.assert_close(scores_N[labels_N == label], wanted, rtol=1e-5, atol=1e-9)


def test_the_uncentred_score_would_be_another(in_batches: InBatches, compute: Compute) -> None:
    """That the next test can fail: what public implementations compute does move with the mean."""
    z_ND, labels_N = two_classes()
    shifted = z_ND + 50.0

    def uncentred(z_ND: Tensor) -> Tensor:
        of_class = z_ND[labels_N == 0]
        direction = torch.linalg.svd(of_class - of_class.mean(0), full_matrices=False).Vh[0]
        return (of_class @ direction).square()

    assert (uncentred(shifted) / uncentred(z_ND)).median() > 10


@every_scorer
def test_a_constant_added_to_all_embeddings_changes_no_score(in_batches: InBatches, compute: Compute, config) -> None:  # type: ignore[no-untyped-def]
    z_ND, labels_N = two_classes()
    z_ND = (z_ND * 64).round() / 64  # so that float32 holds the shifted values exactly
    shift_D = torch.linspace(-32, 32, 16, dtype=torch.float64).round()
    batches, shifted = in_batches(z_ND, labels_N), in_batches(z_ND + shift_D, labels_N)
    before = scores_of(fitted(config, batches, compute), batches)
    after = scores_of(fitted(config, shifted, compute), shifted)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [PLAIN, ROBUST], ids=["plain", "robust"])
def test_a_rotation_of_all_embeddings_changes_no_score(
    in_batches: InBatches, compute: Compute, config: SpectralConfig
) -> None:
    z_ND, labels_N = two_classes()
    rotation_DD = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).double()).Q
    batches, rotated = in_batches(z_ND, labels_N), in_batches(z_ND @ rotation_DD, labels_N)
    before = scores_of(fitted(config, batches, compute), batches)
    torch.testing.assert_close(scores_of(fitted(config, rotated, compute), rotated), before, rtol=1e-3, atol=1e-5)


# --- every scorer -----------------------------------------------------------------------------------------------


@every_scorer
def test_any_order_and_size_of_batches_gives_the_same_scores(in_batches: InBatches, compute: Compute, config) -> None:  # type: ignore[no-untyped-def]
    z_ND, labels_N = two_classes()
    whole = in_batches(z_ND, labels_N, 10_000)
    wanted = scores_of(fitted(config, whole, compute), whole)
    for size, reverse in ((1, False), (7, True), (64, False)):
        batches = in_batches(z_ND, labels_N, size)
        stream = batches[::-1] if reverse else batches
        scores_N = scores_of(fitted(config, stream, compute), batches)
        # Scores are float32: 1e-9 is what the float64 state under them keeps.
        torch.testing.assert_close(scores_N, wanted, rtol=2e-6, atol=1e-6)


def test_streaming_keeps_the_state_to_nine_digits(in_batches: InBatches, compute: Compute) -> None:
    z_ND, labels_N = two_classes()
    states = []
    for batches in (in_batches(z_ND, labels_N, 10_000), in_batches(z_ND, labels_N, 7)[::-1]):
        state = fitted(PLAIN, batches, compute).state_dict()
        states.append({name: t.abs() if name.endswith("map") else t for name, t in state.items()})  # sign is free
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-9, atol=1e-9)


@every_scorer
def test_saved_and_loaded_it_gives_the_same_scores_to_the_bit(in_batches: InBatches, compute: Compute, config) -> None:  # type: ignore[no-untyped-def]
    batches = in_batches(*two_classes())
    scorer = fitted(config, batches, compute)
    again = config.build()
    again.load_state(safetensors.torch.load(safetensors.torch.save(scorer.state_dict())), scorer.statistics)
    for batch in batches:
        assert torch.equal(scorer.score(batch), again.score(batch))
    assert again.statistics == scorer.statistics


@every_scorer
def test_fitting_twice_gives_the_same_scores_to_the_bit(in_batches: InBatches, compute: Compute, config) -> None:  # type: ignore[no-untyped-def]
    batches = in_batches(*two_classes())
    first, second = fitted(config, batches, compute), fitted(config, batches, compute)
    assert all(torch.equal(first.score(batch), second.score(batch)) for batch in batches)


@every_scorer
@pytest.mark.parametrize(
    "case",
    [
        "identical rows",
        "one row",
        "two rows",
        "three rows",
        "more features than rows",
        "constant column",
        "huge",
        "tiny",
    ],
)
def test_degenerate_classes_get_finite_scores(in_batches: InBatches, compute: Compute, config, case: str) -> None:  # type: ignore[no-untyped-def]
    z_ND, labels_N = two_classes(200)
    odd_MD = {
        "identical rows": torch.ones(50, 16).double() * 0.1,
        "one row": z_ND[:1],
        "two rows": z_ND[:2],
        "three rows": z_ND[:3],
        "more features than rows": z_ND[:9],
        "constant column": z_ND[:60] * (torch.arange(16) > 0),
        "huge": z_ND[:60] * 1e12,
        "tiny": z_ND[:60] * 1e-12,
    }[case]
    z_ND = torch.cat([z_ND, odd_MD])
    labels_N = torch.cat([labels_N, torch.full((len(odd_MD),), 7)])
    batches = in_batches(z_ND, labels_N)
    scorer = fitted(config, batches, compute)
    for batch in batches:
        scores_B = scorer.score(batch)
        assert scores_B.shape == (len(batch.keys),)
        assert scores_B.dtype == torch.float32
        assert scores_B.isfinite().all()
    for values in scorer.statistics.values():
        assert all(torch.tensor(float(value)).isfinite() for value in values.values())


@every_scorer
def test_a_class_that_was_never_seen_scores_zero(in_batches: InBatches, compute: Compute, config) -> None:  # type: ignore[no-untyped-def]
    z_ND, labels_N = two_classes()
    scorer = fitted(config, in_batches(z_ND, labels_N), compute)
    (batch,) = in_batches(z_ND[:5], torch.full((5,), 99))
    assert torch.equal(scorer.score(batch), torch.zeros(5))


@every_scorer
def test_classes_do_not_influence_each_other(in_batches: InBatches, compute: Compute, config) -> None:  # type: ignore[no-untyped-def]
    """Class 0 keeps its scores when class 1 is replaced by something else."""
    z_ND, labels_N = two_classes()
    other_ND = torch.where(labels_N[:, None] == 1, z_ND.flip(1) * 9 - 4, z_ND)
    before = scores_of(fitted(config, in_batches(z_ND, labels_N), compute), in_batches(z_ND, labels_N))
    after = scores_of(fitted(config, in_batches(other_ND, labels_N), compute), in_batches(other_ND, labels_N))
    torch.testing.assert_close(after[labels_N == 0], before[labels_N == 0], rtol=1e-6, atol=1e-6)


# --- the robust form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_robust_finds_a_tight_cluster_that_the_plain_score_misses(
    in_batches: InBatches, compute: Compute, seed: int
) -> None:
    """The cluster lies where the class varies little; the plain score looks where it varies most."""
    z_ND, labels_N, poisoned_N = planted(seed)
    batches = in_batches(z_ND, labels_N)
    config = SpectralConfig(whiten="robust", n_components=32)
    plain = auroc(scores_of(fitted(PLAIN, batches, compute), batches).numpy(), poisoned_N.numpy())
    robust = auroc(scores_of(fitted(config, batches, compute), batches).numpy(), poisoned_N.numpy())
    assert robust > 0.95
    assert robust > plain + 0.3


def test_robust_moments_are_not_moved_by_what_lies_far_out() -> None:
    generator = torch.Generator().manual_seed(0)
    y_Nk = (
        torch.randn(2000, 4, generator=generator, dtype=torch.float64)
        @ torch.diag(torch.tensor([3.0, 2, 1, 0.5])).double()
    )
    y_Nk[:100] = 40.0
    centre_k, whitener_kk = robust_whitening(y_Nk, 0.15)
    assert centre_k.abs().max() < 0.3
    assert y_Nk.mean(0).abs().max() > 1.5
    white = (y_Nk[100:] - centre_k) @ whitener_kk
    covariance = torch.cov(white.T)
    scale = covariance.diagonal().mean()
    assert 1 < scale < 2.5  # trimmed rows have less variance; the constant is the same in every direction
    assert (covariance / scale - torch.eye(4)).abs().max() < 0.2


def test_robust_whitening_without_trimming_is_whitening() -> None:
    y_Nk = two_classes(100, 5)[0]
    centre_k, whitener_kk = robust_whitening(y_Nk, 0.0)
    torch.testing.assert_close(centre_k, y_Nk.mean(0))
    torch.testing.assert_close(torch.cov(((y_Nk - centre_k) @ whitener_kk).T), torch.eye(5).double())


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0, 50.0])
def test_the_entropy_score_is_its_formula(alpha: float) -> None:
    """score = w^T Q w / tr Q with Q = exp(alpha (S - I) / (||S|| - 1)), written out with a matrix exponential."""
    w_Nk = two_classes(200, 6)[0]
    s_kk = w_Nk.T @ w_Nk / (len(w_Nk) - 1)
    q_kk = torch.linalg.matrix_exp(alpha * (s_kk - torch.eye(6).double()) / (torch.linalg.matrix_norm(s_kk, 2) - 1))
    wanted_N = torch.einsum("ni,ij,nj->n", w_Nk, q_kk, w_Nk) / q_kk.trace()
    scores_N = (w_Nk @ quantum_entropy_root(w_Nk, alpha)).square().sum(1)
    torch.testing.assert_close(scores_N, wanted_N, rtol=1e-6, atol=1e-9)
    if alpha == 0:
        torch.testing.assert_close(scores_N, w_Nk.square().sum(1) / 6)
    if alpha == 50:
        top = torch.linalg.eigh(s_kk).eigenvectors[:, -1]
        torch.testing.assert_close(scores_N, (w_Nk @ top).square(), rtol=1e-2, atol=1e-2)


def test_more_rows_than_the_sample_holds_change_little(in_batches: InBatches, compute: Compute) -> None:
    z_ND, labels_N, poisoned_N = planted(0, n=3000, n_poisoned=90)
    batches = in_batches(z_ND, labels_N, 500)
    config = SpectralConfig(whiten="robust", n_components=32, max_samples=600)
    scores_N = scores_of(fitted(config, batches, compute), batches)
    assert auroc(scores_N.numpy(), poisoned_N.numpy()) > 0.9
