"""Features of a site are those at the time of its call, even if the network overwrites them later."""

import pytest
import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.models.config import ModelConfig
from sanitize.models.taps import Tapped, find_taps
from sanitize.repairs import RepairInputs, in_memory
from sanitize.repairs.observe import Pooling, group_moments, sample_features
from sanitize.repairs.sites import find_sites


class WritesInPlace(nn.Module):
    """An in-place ReLU behind a Linear, as in torchvision's VGG; the head's input is overwritten when it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.head = nn.Linear(12, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        z_BD = self.relu(self.first(x_BCHW.flatten(1)))
        logits_BK = self.head(z_BD)
        z_BD.zero_()
        return logits_BK


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return WritesInPlace().eval()


@pytest.mark.parametrize("pooling", ["max", "mean", "max_mean", "position"])
def test_features_are_those_before_the_in_place_relu(model: nn.Module, pooling: Pooling, compute: Compute) -> None:
    config = ModelConfig(n_classes=3, image_shape=(3, 2, 2))
    images_NCHW = torch.randint(256, (20, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = RepairInputs(config, in_memory(images_NCHW, torch.zeros(20, dtype=torch.int64)))
    sites = find_sites(model, config.example())
    assert [(site.name, site.side) for site in sites] == [("first", "output"), ("head", "input")]
    z_ND = model.first(config.normalise(images_NCHW).flatten(1)).detach()  # type: ignore[operator]
    assert (z_ND < 0).any()
    sample = sample_features(model, sites, inputs, pooling, 100, compute)
    for name, wanted_ND in (("first", z_ND), ("head", z_ND.relu())):
        assert torch.equal(sample.pooled[name].sort(0).values, wanted_ND.double().sort(0).values)
    moments = group_moments(model, sites, inputs, lambda _pooled, y_B: torch.zeros_like(y_B), compute)
    torch.testing.assert_close(moments["first"][0].mean_D, z_ND.double().mean(0))


def test_the_embedding_is_what_the_head_was_given(model: nn.Module) -> None:
    x_BCHW = torch.randn(5, 3, 2, 2)
    with torch.no_grad():
        seen = Tapped(model, find_taps(model, x_BCHW))(x_BCHW)
    torch.testing.assert_close(model.head(seen["penultimate"]), seen["logits"])  # type: ignore[operator]
