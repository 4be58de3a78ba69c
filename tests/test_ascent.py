"""Projected gradient ascent against problems whose constrained maximum is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sanitize.ascent import l2_ball, linf_ball, projected_ascent

coordinates = st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4)


@given(coordinates, coordinates, st.floats(0.125, 4))
def test_ascent_ends_at_the_point_of_the_ball_nearest_to_the_peak(
    center: list[float], peak: list[float], radius: float
) -> None:
    center_D, peak_D = torch.tensor(center), torch.tensor(peak)
    balls = {
        "linf": (linf_ball(center_D, radius, -1, 1), center_D),
        "l2": (l2_ball(radius), torch.zeros(4)),
    }
    for project, start_D in balls.values():
        start_D = project(start_D)
        before_D = start_D.clone()
        found_D = projected_ascent(
            start_D, lambda x_D, _: -(x_D - peak_D).square().sum() / 2, lambda g_D: g_D / 2, project, 60
        )
        torch.testing.assert_close(found_D, project(peak_D), atol=1e-4, rtol=0)
        assert torch.equal(start_D, before_D)
        assert not found_D.requires_grad


@given(coordinates, coordinates, st.floats(0, 4))
def test_a_projection_is_inside_and_leaves_what_is_inside(
    center: list[float], point: list[float], radius: float
) -> None:
    center_D, point_D = torch.tensor(center), torch.tensor(point)
    inside_D = linf_ball(center_D, radius)(point_D)
    assert (inside_D - center_D).abs().max() <= radius + 1e-5
    assert torch.equal(linf_ball(center_D, radius)(inside_D), inside_D)
    bounded_D = linf_ball(center_D, 100.0, torch.full((4,), -2.0), torch.tensor(3.0))(point_D)
    assert torch.equal(bounded_D, point_D.clamp(-2, 3))
    short_D = l2_ball(radius)(point_D)
    assert short_D.norm() <= radius * (1 + 1e-5)
    if point_D.norm() <= radius * (1 - 1e-5):
        assert torch.equal(short_D, point_D)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_loss_sees_each_point_with_its_number_even_without_gradients(n: int) -> None:
    seen: list[tuple[float, int]] = []

    def loss(x: Tensor, number: int) -> Tensor:
        seen.append((x.item(), number))
        return 2 * x

    with torch.no_grad():
        found = projected_ascent(torch.tensor(1.0), loss, lambda g: g, nn.Identity(), n)
    assert seen == [(1.0 + 2 * i, i) for i in range(n)]
    assert float(found) == 1 + 2 * n
