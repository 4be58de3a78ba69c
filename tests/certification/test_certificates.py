"""Radii that people read."""

from hypothesis import given
from hypothesis import strategies as st

from sanitize.certification.certificates import excerpt, round_radii


@given(st.floats(1e-6, 1e6), st.integers(2, 100))
def test_radii_are_a_round_number_apart_and_reach_the_largest(largest: float, n: int) -> None:
    radii = round_radii(largest, n)
    assert radii[0] == 0
    assert len(radii) <= n + 2
    step = largest / n
    assert largest - radii[-1] <= 10 * step


@given(st.floats(0.001, 10_000))
def test_an_excerpt_is_of_the_curve_and_starts_where_it_does(largest: float) -> None:
    curve = [[radius, 0.5] for radius in round_radii(largest, 50)]
    points = excerpt(curve)
    assert points[0] == curve[0]
    assert all(point in curve for point in points)
    assert min(len(curve), 3) <= len(points) <= 12


def test_counts_are_whole() -> None:
    assert round_radii(7, 1000, 1) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [point[0] for point in excerpt([[float(r), 1.0] for r in range(26)])] == [0, 5, 10, 15, 20, 25]
