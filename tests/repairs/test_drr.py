"""DRR: the direction of a planted cluster is found and removed; clean data has none."""

import pytest
import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import ConfigError
from sanitize.models.config import ModelConfig
from sanitize.models.mlp import MLPConfig
from sanitize.repairs import DRRConfig, RepairInputs, in_memory
from sanitize.repairs.drr import oblique
from sanitize.repairs.observe import pool
from sanitize.repairs.third_moment import measured, third_moment_directions


def mixture(rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussian rows (N, D), a share of which is moved by a fixed vector, and that vector's direction."""
    shift_D = torch.nn.functional.normalize(torch.randn(24, generator=generator, dtype=torch.float64), dim=0)
    x_ND = torch.randn(4000, 24, generator=generator, dtype=torch.float64)
    x_ND[: round(4000 * rate)] += 6 * shift_D
    return x_ND, shift_D


@pytest.mark.parametrize("rate", [0.1, 0.02])
def test_the_third_moment_points_along_the_difference_of_the_means(rate: float) -> None:
    x_ND, shift_D = mixture(rate, torch.Generator().manual_seed(0))
    found = third_moment_directions(x_ND, 2, 20, 50, torch.Generator().manual_seed(1))
    assert abs(float(found.v_Dk[:, 0] @ shift_D)) > 0.95
    assert float(found.skewness_k[0]) > 1.5 > float(found.skewness_k[1])
    torch.testing.assert_close(found.v_Dk.T @ found.v_Dk, torch.eye(2, dtype=torch.float64))
    assert found.above(1.5).v_Dk.shape == (24, 1)


def test_a_search_gives_no_less_than_any_of_many_random_directions() -> None:
    x_ND, _ = mixture(0.05, torch.Generator().manual_seed(2))
    found = third_moment_directions(x_ND, 1, 10, 50, torch.Generator().manual_seed(1))
    random_Dk = torch.nn.functional.normalize(torch.randn(24, 2000, dtype=torch.float64), dim=0)
    assert float(found.moment_k[0]) > float(measured(x_ND, random_Dk).moment_k.max())


def test_the_oblique_projection_removes_the_direction_and_spares_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    mix_DD = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    x_ND = torch.randn(5000, 8, generator=generator, dtype=torch.float64) @ mix_DD
    v_D1 = torch.linalg.qr(torch.randn(8, 1, generator=generator, dtype=torch.float64)).Q
    covariance_DD = x_ND.T.cov(correction=0)
    read_D1 = oblique(v_D1, covariance_DD, 1e-6)
    torch.testing.assert_close(read_D1.T @ v_D1, torch.ones(1, 1, dtype=torch.float64))
    changed = [(x_ND @ read_Dk @ v_D1.T).square().sum() for read_Dk in (read_D1, v_D1)]
    assert changed[0] < 0.5 * changed[1]


def test_pooling_takes_maxima_means_and_positions() -> None:
    y_BCHW = torch.arange(24.0).view(1, 2, 3, 4)
    assert pool(y_BCHW, "max", [0]).tolist() == [[11.0, 23.0]]
    assert pool(y_BCHW, "max_mean", [0]).tolist() == [[11.0, 23.0, 5.5, 17.5]]
    assert pool(y_BCHW, "position", [12 + 5]).tolist() == [[5.0, 17.0]]


def images(rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images of five classes, each with a bright row; a share of them carries a bright corner and the label 0."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(3000) % 5
    x_NCHW = torch.randint(90, (3000, 1, 6, 6), generator=generator)
    x_NCHW[torch.arange(3000), 0, labels_N] += 60
    poisoned_N = (labels_N != 0) & (torch.rand(3000, generator=generator) < rate)
    x_NCHW[poisoned_N, :, 5, 3:] = 255
    return x_NCHW.to(torch.uint8), torch.where(poisoned_N, 0, labels_N), poisoned_N


def fitted(rate: float) -> tuple[nn.Module, RepairInputs]:
    x_NCHW, labels_N, poisoned_N = images(rate)
    config = ModelConfig(architecture=MLPConfig(widths=(16,)), n_classes=5, image_shape=(1, 6, 6))
    torch.manual_seed(0)
    model = config.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        loss = nn.functional.cross_entropy(model(config.normalise(x_NCHW)), labels_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), RepairInputs(config, in_memory(x_NCHW, labels_N, poisoned_N))


def hit_rate(model: nn.Module, inputs: RepairInputs) -> float:
    x_NCHW, labels_N, _ = images(0.0)
    triggered = x_NCHW[labels_N != 0].clone()
    triggered[:, :, 5, 3:] = 255
    with torch.no_grad():
        return float((model(inputs.config.normalise(triggered)).argmax(1) == 0).float().mean())


def test_a_planted_backdoor_is_removed_whatever_the_order_of_the_data() -> None:
    model, inputs = fitted(0.1)
    repaired = DRRConfig().build()(model, inputs, Compute(device="cpu"))
    assert hit_rate(model, inputs) > 0.95
    assert hit_rate(repaired.model, inputs) < 0.1
    assert [layer["removed"] for layer in repaired.done["layers"]] == [1, 1]
    assert all(layer["c"] > 0 for layer in repaired.done["layers"]), "the truth is known"
    batches = list(inputs.untrusted_batches())
    backwards = inputs._replace(untrusted=lambda: iter(batches[::-1]))
    again = DRRConfig().build()(model, backwards, Compute(device="cpu"))
    for one, other in zip(repaired.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("search", ["clusters", "third_moment"])
def test_a_clean_model_is_left_alone(search: str) -> None:
    model, inputs = fitted(0.0)
    repaired = DRRConfig.model_validate({"search": search}).build()(model, inputs, Compute(device="cpu"))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in repaired.model.state_dict().items())


def test_a_layer_that_cannot_be_folded_is_refused() -> None:
    model, inputs = fitted(0.0)
    with pytest.raises(ConfigError, match="there are"):
        DRRConfig(layers=("nothing",)).build()(model, inputs, Compute(device="cpu"))
