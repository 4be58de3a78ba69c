"""I-BAU: the hypergradient equals the exact one where that is known, and the perturbation stays in its ball."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.repairs import CleanImages, IBAUConfig, RepairInputs
from sanitize.repairs.ibau import ascend, conjugate_gradient, fixed_point, hypergradient


def concave_problem() -> tuple[Tensor, Tensor, Tensor]:
    """H(delta, theta) = theta^T M delta - delta^T A delta / 2 + sum sin(theta) with A positive definite."""
    generator = torch.Generator().manual_seed(0)
    root_DD = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a_DD = root_DD @ root_DD.T / 6 + torch.eye(6, dtype=torch.float64)
    m_PD = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return a_DD, m_PD, torch.randn(5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("solver", "n_steps"), [("fixed_point", 400), ("conjugate_gradient", 6)])
def test_the_hypergradient_is_the_derivative_through_the_argmax(solver: str, n_steps: int) -> None:
    a_DD, m_PD, theta_P = concave_problem()

    def argmax(theta: Tensor) -> Tensor:
        return torch.linalg.solve(a_DD, m_PD.T @ theta)

    def outer_of(delta: Tensor, theta: Tensor) -> Tensor:
        return (delta.pow(3).sum() * theta.norm() + (theta * delta[:5]).sum()).tanh() + theta.square().sum()

    exact = torch.func.grad(lambda theta: outer_of(argmax(theta), theta))(theta_P)
    weights_P = theta_P.clone().requires_grad_(True)

    def inner(delta: Tensor) -> Tensor:
        return weights_P @ m_PD @ delta - delta @ a_DD @ delta / 2 + weights_P.sin().sum()

    at = argmax(theta_P)
    (found,) = hypergradient(inner, lambda delta: outer_of(delta, weights_P), at, [weights_P], solver, n_steps, 0.2)
    (direct,) = hypergradient(inner, lambda delta: outer_of(delta, weights_P), at, [weights_P], None, n_steps, 0.2)
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)
    assert (direct - exact).abs().max() > 1e-2, "the implicit term is not nothing here"


def test_both_solvers_solve() -> None:
    a_DD, _, _ = concave_problem()
    g_D = torch.arange(6, dtype=torch.float64)
    exact = torch.linalg.solve(a_DD, g_D)
    torch.testing.assert_close(fixed_point(lambda v: a_DD @ v, g_D, 500, 0.2), exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(conjugate_gradient(lambda v: a_DD @ v, g_D, 6), exact, atol=1e-6, rtol=0)


def test_conjugate_gradient_stops_where_there_is_no_maximum() -> None:
    assert torch.equal(conjugate_gradient(lambda v: -v, torch.ones(3), 5), torch.zeros(3))


def test_the_perturbation_is_projected_onto_the_ball() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    batches = [(torch.randn(8, 3, 2, 2), torch.randint(3, (8,))) for _ in range(4)]
    assert float(ascend(model, batches, 0.5, 100.0).norm()) == pytest.approx(0.5, rel=1e-5)


def test_a_round_uses_all_images_and_leaves_the_given_model_and_batch_norm_alone() -> None:
    config = ModelConfig(architecture=ConvNetConfig(widths=(4, 8)), n_classes=3, image_shape=(1, 8, 8))
    torch.manual_seed(0)
    model = config.build().eval()
    before = copy.deepcopy(model.state_dict())
    images, labels = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8), torch.randint(3, (50,))
    inputs = RepairInputs(config, clean=CleanImages(images[:40], labels[:40], images[40:], labels[40:]))
    method = IBAUConfig(rounds=2, batch_size=16, max_drop=1.0)
    repaired, again = (method.build()(model, inputs, Compute(device="cpu")) for _ in range(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [len(repaired.done["rounds"]), repaired.done["taken"] <= 2] == [3, True]
    for name, tensor in repaired.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
        if "running" in name:
            assert torch.equal(tensor, before[name])
    assert all(row["perturbation_l2"] <= 10.0 + 1e-4 for row in repaired.done["rounds"])
