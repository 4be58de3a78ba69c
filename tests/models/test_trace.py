"""The calls of a network's layers, in the order in which they run."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from sanitize.models.trace import last_linear, trace


class Twice(nn.Module):
    """One Linear runs twice, once by keyword; another is defined first and runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.inner, self.norm = nn.Linear(4, 2), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(input=self.inner(x_BD))))


def test_calls_are_those_of_the_forward_pass() -> None:
    model, x_BD = Twice(), torch.randn(3, 4)
    calls = trace(model, x_BD)
    assert [call.name for call in calls] == ["inner", "inner", "norm", "head"]
    assert all(later.x is earlier.y for earlier, later in pairwise(calls))
    assert calls[0].x is x_BD
    assert torch.equal(calls[-1].y, model.eval()(x_BD))
    assert last_linear(calls) == "head"
    assert last_linear(trace(nn.Sequential(nn.Conv2d(1, 1, 1)), torch.zeros(1, 1, 2, 2))) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_a_network_without_weights_has_no_calls() -> None:
    assert trace(nn.Flatten(), torch.zeros(2, 1, 2, 2)) == []
