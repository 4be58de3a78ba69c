"""Robust collaborative autoencoders against a twin of one network at a time, and what must hold of every score."""

import itertools

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn.functional import leaky_relu

from sanitize.errors import ConfigError, DataError, NumericsError
from sanitize.measure import auroc
from sanitize.score import rca
from sanitize.score.rca import RCA, RCAConfig, pick, selected_fractions
from sanitize.score.scaling import Scaling

SMALL = RCAConfig(widths=(16, 12), n_codes=3, epochs=6, n_passes=7, batch_size=20, contamination=0.2)
VARIANTS = {
    "rca": SMALL,
    "no dropout": SMALL.model_copy(update={"dropout": 0.0}),
    "three networks": SMALL.model_copy(update={"n_networks": 3}),
    "one network": SMALL.model_copy(update={"n_networks": 1}),
    "no selection": SMALL.model_copy(update={"select": False}),
    "no ensemble": SMALL.model_copy(update={"ensemble": False}),
    "variational": SMALL.model_copy(update={"variational": True}),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def rows(n: int = 90, d: int = 8, seed: int = 0) -> Tensor:
    """Gaussian rows near a plane, and a tenth of them away from it."""
    generator = Generator().manual_seed(seed)
    x_ND = torch.randn(n, 2, generator=generator) @ torch.randn(2, d, generator=generator)
    x_ND[: n // 10] += torch.randn(n // 10, d, generator=generator)
    return x_ND + 0.1 * torch.randn(n, d, generator=generator)


# --- training ---------------------------------------------------------------------------------------------------


class SlowNetwork:
    """One autoencoder, one row of the stack."""

    def __init__(self, layers: rca.Layers, which: int, learning_rate: float) -> None:
        self.layers = [
            (w[which].detach().clone().requires_grad_(), b[which, 0].detach().clone().requires_grad_())
            for w, b in layers
        ]
        self.adam = torch.optim.Adam([t for layer in self.layers for t in layer], lr=learning_rate, foreach=False)

    def reconstruct(self, x_D: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """One row; `masks` are of the four hidden layers of a 2 + 2 network."""
        for i, (weight, bias) in enumerate(self.layers):
            x_D = x_D @ weight + bias
            if i in (0, 1, 3, 4):
                x_D = leaky_relu(x_D, 0.1)
                if masks is not None:
                    x_D = x_D * masks[(0, 1, None, 2, 3)[i]]
        return x_D

    def error(self, x_D: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        return (self.reconstruct(x_D, masks) - x_D).square().sum()


def slow_fit(config: RCAConfig, x_ND: Tensor, seed: int) -> list[SlowNetwork]:
    """Algorithm 1 as it is written: a loop over networks, a loop over rows."""
    x_ND = Scaling.of(x_ND, equal="range").apply(x_ND)
    generator = Generator().manual_seed(seed)
    k = config.n_networks
    layers = rca._initial(config, x_ND.shape[1], generator)
    networks = [SlowNetwork(layers, j, config.learning_rate) for j in range(k)]
    beta = 1.0
    n_batches = max(1, round(len(x_ND) / config.batch_size))
    size = len(x_ND) // n_batches
    for _ in range(config.epochs):
        order = torch.randperm(len(x_ND), generator=generator)
        for b in range(n_batches):
            batch = [x_ND[i] for i in order[b * size : (b + 1) * size]]
            n_picked = int(beta * size + 1e-9)
            chosen = []
            for network in networks:
                with torch.no_grad():
                    errors = [float(network.error(x_D)) for x_D in batch]
                chosen.append(sorted(range(size), key=errors.__getitem__)[:n_picked])
            shift = 0
            if (n_picked < size or not config.dropout) and k > 1:
                shift = int(torch.randint(1, k, (1,), generator=generator))
            masks = []
            if config.dropout:
                masks = [
                    rca._drawn_masks(config.dropout, generator, k, n_picked, h) for h in rca._hidden_widths(config)
                ]
            for j, network in enumerate(networks):
                given_rows = chosen[(j - shift) % k] if n_picked < size else range(size)
                losses = [
                    network.error(batch[i], [m[j, p] for m in masks] if masks else None) / 2
                    for p, i in enumerate(given_rows)
                ]
                network.adam.zero_grad()
                (sum(losses) / n_picked).backward()  # type: ignore[union-attr]
                network.adam.step()
        beta = max(beta - config.contamination / (config.alpha * config.epochs), 1 - config.contamination)
    return networks


@pytest.mark.parametrize(("k", "dropout"), [(1, 0.5), (2, 0.0), (2, 0.5), (3, 0.5)])
def test_training_is_the_algorithm_network_by_network(k: int, dropout: float) -> None:
    config = SMALL.model_copy(update={"n_networks": k, "dropout": dropout, "epochs": 3})
    x_ND = rows(40)
    state = RCA(config).fit(x_ND, seed=5).state_dict()
    for j, network in enumerate(slow_fit(config, x_ND, 5)):
        for i, (weight, bias) in enumerate(network.layers):
            torch.testing.assert_close(state[f"layers.{i}.weight"][j], weight.detach(), rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(state[f"layers.{i}.bias"][j, 0], bias.detach(), rtol=1e-3, atol=1e-5)


def test_each_network_is_given_the_picks_of_another() -> None:
    errors_kB = torch.tensor([[3.0, 1, 2, 0], [0, 1, 2, 3], [9, 9, 0, 0]])
    best = [{1, 3}, {0, 1}, {2, 3}]
    for shift in (0, 1, 2):
        given_kP = pick(errors_kB, 2, shift)
        assert [set(picked_P.tolist()) for picked_P in given_kP] == [best[(j - shift) % 3] for j in range(3)]


def test_no_network_keeps_its_picks_and_all_others_get_them() -> None:
    generators = [Generator().manual_seed(seed) for seed in range(200)]
    assert {rca._shift(4, generator) for generator in generators} == {1, 2, 3}
    assert {rca._shift(2, generator) for generator in generators} == {1}


@given(st.floats(0, 0.5), st.floats(0.01, 1), st.integers(1, 300))
def test_beta_falls_from_one_to_its_floor(contamination: float, alpha: float, epochs: int) -> None:
    betas = selected_fractions(contamination, alpha, epochs)
    assert len(betas) == epochs
    assert betas[0] == 1
    assert all(a >= b >= 1 - contamination for a, b in itertools.pairwise(betas))
    for epoch, beta in enumerate(betas):
        assert beta == pytest.approx(max(1 - contamination * epoch / (alpha * epochs), 1 - contamination))


def test_picks_are_made_without_dropout_and_updates_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is given to the update is the beta share, in batches of equal size."""
    passes: list[tuple[bool, bool, int]] = []
    forward = rca.forward

    def spied(layers, x_kBD, masks=(), noise_kBC=None):  # type: ignore[no-untyped-def]
        passes.append((torch.is_grad_enabled(), bool(masks), x_kBD.shape[1]))
        return forward(layers, x_kBD, masks, noise_kBC)

    monkeypatch.setattr(rca, "forward", spied)
    RCA(SMALL.model_copy(update={"epochs": 2, "alpha": 0.5})).fit(rows(90))  # four batches of 22
    assert passes == [(True, True, 22)] * 4 + [(False, False, 22), (True, True, 17)] * 4


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_the_mean(dropout: float) -> None:
    masks = rca._drawn_masks(dropout, Generator().manual_seed(0), 6, 500, 100)
    assert masks.shape == (6, 500, 100)
    values, counts = masks.unique(return_counts=True)
    assert len(values) == 2
    assert values[0] == 0
    assert float(counts[0]) / masks.numel() == pytest.approx(dropout, abs=0.005)
    assert float(masks.mean()) == pytest.approx(1, abs=0.01)
    flat = masks.view(6, -1) - masks.mean()
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.02  # each network has its own masks


def test_the_divergence_is_that_of_torch() -> None:
    model = RCA(VARIANTS["variational"]).fit(rows())
    layers = model._state().layers
    x_kBD, noise_kBC = rows(20).expand(2, -1, -1), torch.randn(2, 20, 3, generator=Generator().manual_seed(0))
    code_kBC = leaky_relu(torch.baddbmm(layers[0][1], x_kBD, layers[0][0]), 0.1)
    code_kBC = leaky_relu(torch.baddbmm(layers[1][1], code_kBC, layers[1][0]), 0.1)
    mean_kBC, log_variance_kBC = torch.baddbmm(layers[2][1], code_kBC, layers[2][0]).chunk(2, -1)
    posterior = torch.distributions.Normal(mean_kBC, (log_variance_kBC / 2).exp())
    wanted = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(rca.forward(layers, x_kBD, (), noise_kBC)[1], wanted)


# --- scores -----------------------------------------------------------------------------------------------------


def test_a_score_is_the_mean_error_over_passes_and_networks() -> None:
    x_ND = rows()
    model = RCA(SMALL).fit(x_ND)
    state = model._state()
    wanted_N = torch.zeros(len(x_ND))
    for j in range(SMALL.n_networks):
        network = SlowNetwork(state.layers, j, 0.1)
        for v in range(SMALL.n_passes):
            masks = [mask_kvH[j, v] / (1 - SMALL.dropout) for mask_kvH in state.drawn.values()]
            for i, x_D in enumerate(state.scaling.apply(x_ND)):
                wanted_N[i] += network.error(x_D, masks).detach() / x_ND.shape[1]
    torch.testing.assert_close(model.score(x_ND), wanted_N / (SMALL.n_networks * SMALL.n_passes), rtol=1e-4, atol=1e-6)


def test_without_ensemble_a_score_is_the_error_without_dropout() -> None:
    x_ND = rows()
    model = RCA(VARIANTS["no ensemble"]).fit(x_ND)
    state = model._state()
    networks = [SlowNetwork(state.layers, j, 0.1) for j in range(2)]
    wanted = [sum(network.error(x_D).detach() for network in networks) / 16 for x_D in state.scaling.apply(x_ND)]
    torch.testing.assert_close(model.score(x_ND), torch.stack(wanted), rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]


FITTED = {name: RCA(config).fit(rows()) for name, config in VARIANTS.items()}


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=10)
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 90), max_size=4))
def test_any_order_and_batches_give_the_same_scores_to_the_bit(name: str, random, cuts: list[int]) -> None:  # type: ignore[no-untyped-def]
    model, x_ND = FITTED[name], rows()
    order = list(range(90))
    random.shuffle(order)
    edges = sorted({0, 90, *cuts})
    parts = [model.score(x_ND[order[a:b]]) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), model.score(x_ND)[order])


@every_variant
def test_saved_and_loaded_it_gives_the_same_scores_to_the_bit(config: RCAConfig) -> None:
    x_ND = rows()
    x_ND[3, 4] = float("nan")
    model = RCA(config).fit(x_ND)
    again = RCA(config).load_state(safetensors.torch.load(safetensors.torch.save(model.state_dict())))
    assert torch.equal(again.score(x_ND), model.score(x_ND))
    assert again.missing_fraction == model.missing_fraction == pytest.approx(1 / x_ND.numel())


@every_variant
def test_the_seed_decides_everything(config: RCAConfig) -> None:
    x_ND = rows()
    scores_N = RCA(config).fit(x_ND, seed=3).score(x_ND)
    torch.manual_seed(1234)
    assert torch.equal(RCA(config).fit(x_ND, seed=3).score(x_ND), scores_N)
    assert not torch.equal(RCA(config).fit(x_ND, seed=4).score(x_ND), scores_N)


@every_variant
def test_units_of_the_columns_change_nothing(config: RCAConfig) -> None:
    x_ND = (rows() * 64).round().double()
    other_ND = x_ND * torch.tensor([4.0, -0.5, 1, 2**20, 2**-40, 8, 1, 1]) + torch.tensor([0.0, 3, -7, 0, 0, 1, 64, 1])
    wanted = RCA(config).fit(x_ND).score(x_ND)
    signs = torch.tensor([1.0, -1, 1, 1, 1, 1, 1, 1])  # a network is not the same for a mirrored column
    torch.testing.assert_close(RCA(config).fit(other_ND * signs).score(other_ND * signs), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["torch float64", "numpy float32", "numpy float64", "reversed view", "read-only"])
def test_the_container_of_the_rows_changes_nothing(kind: str) -> None:
    x_ND = rows()
    read_only = x_ND.numpy().copy()
    read_only.flags.writeable = False
    other = {
        "torch float64": x_ND.double(),
        "numpy float32": x_ND.numpy(),
        "numpy float64": x_ND.double().numpy(),
        "reversed view": x_ND.flip(0).numpy()[::-1],
        "read-only": read_only,
    }[kind]
    assert torch.equal(RCA(SMALL).fit(other).score(other), FITTED["rca"].score(x_ND))


# --- missing and odd values -------------------------------------------------------------------------------------


def test_missing_values_are_the_means_of_training() -> None:
    x_ND = rows().double()
    missing = torch.rand(x_ND.shape, generator=Generator().manual_seed(0)) < 0.2
    holed_ND = x_ND.masked_fill(missing, float("nan"))
    mean_D = holed_ND.nanmean(0)
    imputed_ND = torch.where(missing, mean_D, x_ND)
    model, wanted = RCA(SMALL).fit(holed_ND), RCA(SMALL).fit(imputed_ND)
    torch.testing.assert_close(model.score(holed_ND), wanted.score(imputed_ND), rtol=1e-4, atol=1e-5)
    assert model.missing_fraction == pytest.approx(float(missing.double().mean()))
    assert wanted.missing_fraction == 0
    nothing_1D = torch.full((1, 8), float("nan"))
    torch.testing.assert_close(model.score(nothing_1D), model.score(mean_D[None]), rtol=1e-4, atol=1e-5)


def odd(generator: Generator) -> dict[str, Tensor]:
    """Tables that are hard on a scaling."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "zeros": torch.zeros(50, 3),
        "a constant that float32 cannot hold": torch.full((50, 3), 0.1),
        "one row": torch.ones(1, 4),
        "two rows": normal(2, 4),
        "one column": normal(70, 1),
        "more columns than rows": normal(30, 200),
        "bytes": torch.randint(0, 255, (60, 5), dtype=torch.uint8, generator=generator),
        "small integers": torch.randint(-9, 9, (60, 5), dtype=torch.int16, generator=generator),
        "truth values": normal(60, 5) > 0,
        "half precision": normal(60, 5).half(),
        "squares overflow": normal(60, 5).double() * 1e300,
        "squares vanish": normal(60, 5).double() * 1e-300,
        "one row far out": torch.cat([normal(59, 5), torch.full((1, 5), 1e30)]),
        "three rows again and again": normal(3, 5).repeat(20, 1),
    }


ODD = odd(Generator().manual_seed(0))


@pytest.mark.parametrize("x_ND", ODD.values(), ids=ODD.keys())
@every_variant
def test_odd_data_gets_finite_scores(config: RCAConfig, x_ND: Tensor) -> None:
    scores_N = RCA(config.model_copy(update={"epochs": 2})).fit(x_ND).score(x_ND)
    assert scores_N.shape == (len(x_ND),)
    assert scores_N.dtype == torch.float32
    assert scores_N.isfinite().all()
    assert (scores_N >= 0).all()


def test_what_no_training_row_was_like_scores_high_and_finite() -> None:
    x_ND = rows().double()
    x_ND[:, 2] = 5.0
    model = RCA(SMALL).fit(x_ND)
    far_ND = torch.stack([x_ND.new_full((8,), 1e308), x_ND.new_full((8,), -1e308), x_ND[20]])
    far_ND[2, 2] = 500.0
    scores = model.score(far_ND)
    assert scores.isfinite().all()
    assert (scores > model.score(x_ND).max()).all()


@pytest.mark.parametrize(
    ("x_ND", "message"),
    [
        (torch.zeros(0, 3), "nothing to fit"),
        (torch.zeros(3, 0), "nothing to fit"),
        (torch.zeros(3), "must be"),
        (torch.zeros(3, 3, dtype=torch.complex64), "real numbers"),
        (np.array([["a", "b"]]), "real numbers"),
        (np.array([[None, 1]], dtype=object), "real numbers"),
        (torch.tensor([[1.0, float("nan")], [2.0, float("nan")]]), r"1 column \(1\)"),
        (torch.tensor([[1.0, float("inf")]]), "infinite"),
        (torch.tensor([[1.0, -float("inf")]]), "infinite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x_ND: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RCA(SMALL).fit(x_ND)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ConfigError, match="not fitted"):
        RCA(SMALL).score(rows())
    with pytest.raises(DataError, match="9 columns"):
        FITTED["rca"].score(torch.zeros(2, 9))
    with pytest.raises(DataError, match="infinite"):
        FITTED["rca"].score(torch.full((2, 8), float("inf")))
    assert FITTED["rca"].score(torch.zeros(0, 8)).shape == (0,)


def test_training_must_not_diverge() -> None:
    with pytest.raises(NumericsError, match="diverged"):
        RCA(SMALL.model_copy(update={"learning_rate": 1e30})).fit(rows())


# --- does it find what it is for --------------------------------------------------------------------------------


def planted(seed: int, n: int = 600, d: int = 16, n_anomalies: int = 180) -> tuple[Tensor, Tensor]:
    """Rows near a plane; 30 % of them near another, so that an autoencoder that sees them learns them too."""
    generator = Generator().manual_seed(seed)
    bases = torch.randn(2, 3, d, generator=generator)
    anomalous_N = torch.randperm(n, generator=generator) < n_anomalies
    codes_N3 = torch.randn(n, 3, generator=generator)
    x_ND = torch.where(anomalous_N[:, None], codes_N3 @ bases[1], codes_N3 @ bases[0])
    return x_ND + 0.1 * torch.randn(n, d, generator=generator), anomalous_N


def test_planted_anomalies_are_found_better_than_by_an_autoencoder() -> None:
    config = RCAConfig(contamination=0.3, widths=(64, 64), n_codes=3, dropout=0.2, epochs=60, n_passes=20)
    plain = config.model_copy(update={"n_networks": 1, "select": False, "ensemble": False})
    seeds = range(3)
    data, truth = zip(*map(planted, seeds), strict=True)
    found = {
        name: [
            auroc(RCA(variant).fit(x_ND, seed).score(x_ND).numpy(), anomalous_N.numpy())
            for seed, x_ND, anomalous_N in zip(seeds, data, truth, strict=True)
        ]
        for name, variant in (("rca", config), ("plain", plain))
    }
    assert np.mean(found["rca"]) > np.mean(found["plain"]) + 0.05
    assert min(found["rca"]) > 0.95
