"""alpha_d against its definition, and on networks whose gradients are known."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.measure import gradient_leaking
from sanitize.measure.leaking import shares


def orthonormal(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


class Along(nn.Module):
    """Two logits that hang on one direction alone."""

    def __init__(self, direction_D: Tensor) -> None:
        super().__init__()
        self.direction_D = nn.Parameter(direction_D.float())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        score_B = x_BCHW.flatten(1) @ self.direction_D
        return torch.stack([score_B, -score_B], 1)


@given(st.integers(0, 10_000))
def test_shares_are_their_definition_rise_and_end_at_one(seed: int) -> None:
    g_BD = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
    vectors_DD = orthonormal(8, seed)
    alpha_BD = shares(g_BD, vectors_DD)
    for g_D, alpha_D in zip(g_BD.double(), alpha_BD, strict=True):
        for d in range(8):
            by_hand = sum(float(g_D @ vectors_DD[:, i]) ** 2 for i in range(d + 1)) / float(g_D @ g_D)
            assert abs(by_hand - float(alpha_D[d])) < 1e-9
    assert (alpha_BD.diff(dim=1) >= 0).all()
    torch.testing.assert_close(alpha_BD[:, -1], torch.ones(5, dtype=torch.float64))


def test_a_network_that_looks_along_one_component_leaks_from_there_on(compute: Compute) -> None:
    vectors_DD = orthonormal(16)
    images_NCHW = torch.randint(256, (300, 1, 4, 4), dtype=torch.uint8)
    labels_N = torch.randint(2, (300,))
    found = gradient_leaking(Along(vectors_DD[:, 5]), images_NCHW, labels_N, vectors_DD, compute, batch_size=128)
    torch.testing.assert_close(found.alpha_R, (torch.arange(16) >= 5).double(), rtol=0, atol=1e-6)
    assert found.n == 300


def test_the_mean_gradient_norm_is_that_of_each_image_alone(compute: Compute) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    images_NCHW, labels_N = torch.rand(7, 1, 4, 4), torch.randint(3, (7,))
    norms = []
    for image_CHW, label in zip(images_NCHW, labels_N, strict=True):
        x_1CHW = image_CHW[None].clone().requires_grad_()
        nn.functional.cross_entropy(model(x_1CHW), label[None]).backward()
        assert x_1CHW.grad is not None
        norms.append(float(x_1CHW.grad.norm()))
    found = gradient_leaking(model, images_NCHW, labels_N, orthonormal(16), compute, batch_size=3)
    assert abs(found.gradient_norm - sum(norms) / 7) < 1e-6


def test_a_network_without_gradients_has_no_share(compute: Compute) -> None:
    found = gradient_leaking(
        Along(torch.zeros(16)), torch.rand(4, 1, 4, 4), torch.zeros(4).long(), orthonormal(16), compute
    )
    assert found.gradient_norm == 0
    assert not found.alpha_R.any()
