"""GroupNorm for BatchNorm: the outputs of a sample no longer depend on the other samples of its batch."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def without_batch_norm(network: nn.Module, groups: int = 8) -> nn.Module:
    """Replace every BatchNorm of `network` by a GroupNorm with new weights, in place.

    Args:
        network: the network; returned (a network that is itself a BatchNorm is returned as a new layer).
        groups: groups of each GroupNorm, or the largest smaller number that divides its channels.
    """
    if isinstance(network, _BatchNorm):
        channels = network.num_features
        divisor = next(n for n in range(min(groups, channels), 0, -1) if channels % n == 0)
        return nn.GroupNorm(divisor, channels, eps=network.eps, affine=network.affine)
    for name, child in network.named_children():
        setattr(network, name, without_batch_norm(child, groups))
    return network
