import logging
import math
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from sanitize.errors import ConfigError, DataError
from sanitize.measure import auroc
from sanitize.score.robust_realnvp import (
    Layers,
    RobustRealNVP,
    RobustRealNVPConfig,
    forward,
    log_density,
    spectrally_normalised,
    trimmed_loss,
)

QUICK = RobustRealNVPConfig(epochs=5, widths=(16, 16), batch_size=64)
REALNVP = QUICK.model_copy(update={"contamination": 0.0, "lipschitz": None})
TRIM = QUICK.model_copy(update={"lipschitz": None})
every_variant = pytest.mark.parametrize("config", [REALNVP, TRIM, QUICK], ids=["RealNVP", "Trim", "Robust"])


def bent(n: int = 300, n_columns: int = 6, seed: int = 0) -> Tensor:
    """Rows (n, D), float64: a curve with noise, in all columns."""
    generator = torch.Generator().manual_seed(seed)
    angle_N = 3 * torch.rand(n, generator=generator, dtype=torch.float64)
    waves_ND = torch.sin(angle_N[:, None] * (1 + torch.arange(n_columns)))
    return 3 + waves_ND + 0.2 * torch.randn(n, n_columns, generator=generator, dtype=torch.float64)


def random_flow(n_columns: int, n_couplings: int = 5, seed: int = 0) -> tuple[Layers, Tensor]:
    """Layers far from the identity, float64, and orders of the columns."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (n_columns // 2, 7, 5, n_columns - n_columns // 2)
    layers = [
        tuple(torch.randn(n_couplings, 2, rows, n_out, generator=generator, dtype=torch.float64) for rows in (n_in, 1))
        for n_in, n_out in pairwise(sizes)
    ]
    orders = [torch.randperm(n_columns, generator=generator) for _ in range(n_couplings)]
    return layers, torch.stack(orders)  # type: ignore[return-value]


def inverse(layers: Layers, orders_TD: Tensor, z_D: Tensor) -> Tensor:
    """The row that one flow carries to z: the couplings undone one by one, as the formula reads."""
    n_given = len(z_D) // 2
    for coupling in reversed(range(len(orders_TD))):
        given, changed = z_D[:n_given], z_D[n_given:]
        s, t = given, given
        for i, (weight, bias) in enumerate(layers):
            s = (s.relu() if i else s) @ weight[coupling, 0] + bias[coupling, 0, 0]
            t = (t.relu() if i else t) @ weight[coupling, 1] + bias[coupling, 1, 0]
        row = torch.cat([given, (changed - t) * torch.exp(-s.tanh())])
        z_D = torch.empty_like(row)
        z_D[orders_TD[coupling]] = row
    return z_D


# --- the flow ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_columns", [2, 3, 6, 9])
def test_the_flow_is_undone_by_its_inverse(n_columns: int) -> None:
    layers, orders_TD = random_flow(n_columns)
    x_BD = bent(10, n_columns)
    z_BD, _ = forward(layers, orders_TD, x_BD)
    assert (z_BD - x_BD).abs().max() > 0.5
    back_BD = torch.stack([inverse(layers, orders_TD, z_D) for z_D in z_BD])
    torch.testing.assert_close(back_BD, x_BD, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_columns", [2, 3, 6, 9])
def test_the_log_determinant_is_that_of_the_autograd_jacobian(n_columns: int) -> None:
    layers, orders_TD = random_flow(n_columns)
    x_BD = bent(10, n_columns)
    _, log_det_B = forward(layers, orders_TD, x_BD)
    for x_D, log_det in zip(x_BD, log_det_B, strict=True):
        jacobian_DD = torch.func.jacrev(lambda x: forward(layers, orders_TD, x[None])[0][0])(x_D)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian_DD).logabsdet, log_det, rtol=1e-9, atol=1e-9)


def test_the_density_is_the_base_density_times_the_determinant() -> None:
    layers, orders_TD = random_flow(4)
    z_BD, log_det_B = forward(layers, orders_TD, bent(10, 4))
    base_B = torch.distributions.Normal(0.0, 1.0).log_prob(z_BD).sum(-1)
    torch.testing.assert_close(log_density(z_BD, log_det_B), base_B + log_det_B)


@every_variant
def test_the_density_of_two_columns_integrates_to_one(config: RobustRealNVPConfig) -> None:
    x_ND = bent(500, 2)
    model = RobustRealNVP(config).fit(x_ND)
    axis = torch.linspace(-8, 8, 161, dtype=torch.float64)  # standard deviations, as the density is
    grid_ND = torch.cartesian_prod(axis, axis) * x_ND.std(0, correction=0) + x_ND.mean(0)
    assert (-model.score(grid_ND).double()).exp().sum() * 0.1**2 == pytest.approx(1, abs=0.01)


# --- robustness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.5, 1.0, 2.0])
def test_after_training_every_layer_has_the_configured_spectral_norm(norm: float) -> None:
    state = RobustRealNVP(QUICK.model_copy(update={"lipschitz": norm})).fit(bent()).state_dict()
    weights = [tensor for name, tensor in state.items() if name.endswith("weight")]
    assert len(weights) == 3
    for weight in weights:
        assert weight.shape[:2] == (4, 2)  # couplings, s and t
        torch.testing.assert_close(torch.linalg.matrix_norm(weight, 2), torch.full((4, 2), norm), rtol=1e-4, atol=0)


def test_without_normalisation_the_norms_are_free() -> None:
    state = RobustRealNVP(TRIM).fit(bent()).state_dict()
    norms = torch.linalg.matrix_norm(state["layers.1.weight"], 2)
    assert (norms - 1).abs().max() > 0.03


def test_power_iteration_reaches_the_norm_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 6, 9, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randn(3, 2, 6, 9, generator=generator, dtype=torch.float64)
    left = torch.ones(3, 2, 1, 6, dtype=torch.float64)
    for _ in range(300):
        applied, left = spectrally_normalised(weight, left, 0.7)
    exact = weight * (0.7 / torch.linalg.matrix_norm(weight, 2, keepdim=True))
    torch.testing.assert_close(applied, exact, rtol=1e-6, atol=1e-8)
    (gradient,) = torch.autograd.grad((applied * target).sum(), weight)
    (wanted,) = torch.autograd.grad((exact * target).sum(), weight)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_the_trimmed_gradient_is_algorithm_2_row_by_row() -> None:
    layers, orders_TD = random_flow(4)
    weight = layers[0][0].requires_grad_()
    x_BD = bent(20, 4)

    def densities() -> Tensor:
        return log_density(*forward(layers, orders_TD, x_BD))

    (gradient,) = torch.autograd.grad(trimmed_loss(densities(), 5), weight)
    rows = densities().detach().argsort().tolist()
    kept = [torch.autograd.grad(-densities()[row], weight)[0] for row in rows[5:]]
    torch.testing.assert_close(gradient, torch.stack(kept).mean(0))


def test_robust_tells_a_planted_cluster_that_the_plain_flow_learns() -> None:
    """10 % of the rows lie tightly together, off the curve that the others lie on."""
    data = [bent(600, 4, seed) for seed in range(3)]
    planted_N = torch.arange(600) < 60
    for seed, x_ND in enumerate(data):
        noise = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x_ND[:60] = torch.tensor([1.0, 5.0, 1.0, 5.0]) + 0.1 * noise

    def aucs(config: RobustRealNVPConfig) -> np.ndarray:
        longer = config.model_copy(update={"epochs": 15, "learning_rate": 5e-3})
        scores = [RobustRealNVP(longer).fit(x_ND, seed).score(x_ND) for seed, x_ND in enumerate(data)]
        return np.array([auroc(scores_N.numpy(), planted_N.numpy()) for scores_N in scores])

    robust, plain = aucs(QUICK), aucs(REALNVP)
    assert robust.min() > 0.9
    assert (robust - plain).min() > 0.2


# --- the estimator ----------------------------------------------------------------------------------------------


@every_variant
def test_saved_and_loaded_it_gives_the_same_scores_to_the_bit(config: RobustRealNVPConfig) -> None:
    x_ND = bent()
    model = RobustRealNVP(config).fit(x_ND)
    saved = safetensors.torch.save(model.state_dict())
    again = RobustRealNVP(config).load_state(safetensors.torch.load(saved))
    assert torch.equal(model.score(x_ND), again.score(x_ND))
    assert again.missing_fraction == model.missing_fraction


def test_fitting_twice_gives_the_same_scores_to_the_bit_and_another_seed_others() -> None:
    x_ND = bent()
    scores = [RobustRealNVP(QUICK).fit(x_ND, seed).score(x_ND) for seed in (3, 3, 4)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2], rtol=1e-3)


@pytest.mark.parametrize("size", [1, 7, 256, 1000])
def test_the_score_of_a_row_does_not_depend_on_its_batch(size: int) -> None:
    x_ND = bent(600)
    model = RobustRealNVP(QUICK).fit(x_ND)
    parts_N = torch.cat([model.score(block) for block in x_ND[:300].split(size)])
    torch.testing.assert_close(parts_N, model.score(x_ND)[:300], rtol=1e-6, atol=1e-6)


def test_scores_are_negative_log_densities_of_the_standardised_rows() -> None:
    x_ND = bent()
    model = RobustRealNVP(QUICK).fit(x_ND)
    state = model.state_dict()
    layers = [(state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()) for i in range(3)]
    standard_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0, correction=0)
    wanted_N = -log_density(*forward(layers, state["orders"], standard_ND))
    torch.testing.assert_close(model.score(x_ND).double(), wanted_N, rtol=1e-5, atol=1e-5)
    assert model.score(x_ND).dtype == torch.float32


def test_arrays_and_tensors_of_all_real_types_are_rows() -> None:
    x_ND = (10 * bent()).round()
    wanted_N = RobustRealNVP(QUICK).fit(x_ND).score(x_ND)
    for same in (x_ND.float(), x_ND.int(), x_ND.numpy(), x_ND.numpy().astype(np.int16), x_ND.numpy().astype(np.uint8)):
        assert torch.equal(RobustRealNVP(QUICK).fit(same).score(same), wanted_N)


def test_missing_values_are_the_means_and_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    x_ND = bent()
    x_ND[:30, 2] = math.nan
    with caplog.at_level(logging.INFO):
        model = RobustRealNVP(QUICK).fit(x_ND)
    assert model.missing_fraction == pytest.approx(30 / x_ND.numel())
    assert "1.67 % of the values are missing" in caplog.text
    filled_ND = x_ND.clone()
    filled_ND[:30, 2] = x_ND[30:, 2].mean()
    torch.testing.assert_close(model.score(x_ND), model.score(filled_ND), rtol=1e-6, atol=1e-6)


@every_variant
@pytest.mark.parametrize(
    "case",
    ["constant column", "identical rows", "one row", "two rows", "wide", "three columns", "huge", "tiny", "one far"],
)
def test_odd_tables_get_finite_scores(config: RobustRealNVPConfig, case: str) -> None:
    x_ND = bent(130)
    x_ND = {
        "constant column": x_ND * (torch.arange(6) != 2) + 7 * (torch.arange(6) == 2),
        "identical rows": x_ND[:1].expand(50, -1),
        "one row": x_ND[:1],
        "two rows": x_ND[:2],
        "wide": bent(5, 40),
        "three columns": x_ND[:, :3],
        "huge": x_ND * 1e300,
        "tiny": x_ND * 1e-300,
        "one far": torch.cat([x_ND, torch.full((1, 6), 1e200, dtype=torch.float64)]),
    }[case]
    model = RobustRealNVP(config).fit(x_ND)
    unseen_ND = torch.full((1, x_ND.shape[1]), -1e308, dtype=torch.float64)
    for rows in (x_ND, unseen_ND):
        scores_N = model.score(rows)
        assert scores_N.shape == (len(rows),)
        assert scores_N.dtype == torch.float32
        assert scores_N.isfinite().all()
    assert model.score(unseen_ND) > model.score(x_ND).max()


@pytest.mark.parametrize(
    ("x_ND", "message"),
    [
        (np.zeros((0, 3)), "nothing to fit"),
        (np.zeros((5, 0)), "nothing to fit"),
        (np.zeros((5, 1)), "at least two columns"),
        (np.full((5, 2), np.nan), r"missing values in 2 columns \(0, 1\)"),
        (np.array([[1.0, np.inf], [2.0, 3.0]]), "infinite"),
        (np.zeros((5, 2, 2)), "must be"),
        (np.array([["a", "b"]]), "real numbers"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x_ND: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RobustRealNVP(QUICK).fit(x_ND)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="not fitted"):
        RobustRealNVP().score(bent())
    model = RobustRealNVP(QUICK).fit(bent())
    with pytest.raises(DataError, match="5 columns, but the model was fitted on 6"):
        model.score(bent()[:, :5])
    with pytest.raises(DataError, match="infinite"):
        model.score(bent() / 0)
    assert model.score(bent()[:0]).shape == (0,)
