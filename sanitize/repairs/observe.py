"""Features of the untrusted data at the sites of a network: a bounded sample, pooled, and moments; one pass each.

Shapes: B batch, N rows of the sample, D features of a site, P pooled features, K classes, H W positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import DataError, NumericsError
from sanitize.repairs.inputs import RepairInputs, UntrustedBatch
from sanitize.repairs.sites import Site, channels_last, watching
from sanitize.streaming import HashSample, Moments

Pooling = Literal["max", "mean", "max_mean", "position"]


class FeatureSample(NamedTuple):
    """A bounded sample of the untrusted data: the samples with the smallest hashes.

    Attributes:
        pooled: pooled features of each site by its name, (N, P), float64.
        predictions_N: predicted classes, int64.
        poisoned_N: True for poisoned samples, bool; None where the truth is not known.
        head: name of the site at the input of the last Linear; None where it is not among the sites.
    """

    pooled: dict[str, Tensor]
    predictions_N: Tensor
    poisoned_N: Tensor | None
    head: str | None


def pool(y_B: Tensor, pooling: Pooling, hashes: Sequence[int]) -> Tensor:
    """Features (B, P) of an activation (B, D, H, W), or a copy of an activation (B, D).

    The result is never the activation itself, because an in-place operation of the network may overwrite it.

    Args:
        y_B: the activation.
        pooling: spatial maximum, spatial mean, both, or the features of one position a sample, chosen by its hash.
        hashes: hashes of the samples.
    """
    if y_B.dim() == 2:
        return y_B.clone()
    y_BDS = y_B.flatten(2)
    if pooling == "max":
        return y_BDS.amax(2)
    if pooling == "mean":
        return y_BDS.mean(2)
    if pooling == "max_mean":
        return torch.cat([y_BDS.amax(2), y_BDS.mean(2)], 1)
    at_B = torch.tensor([value % y_BDS.shape[2] for value in hashes], device=y_B.device)
    return y_BDS[torch.arange(len(y_B), device=y_B.device), :, at_B]


def seen(
    model: nn.Module,
    sites: Sequence[Site],
    inputs: RepairInputs,
    read: Callable[[Tensor, UntrustedBatch], Tensor],
    compute: Compute,
) -> Iterator[tuple[UntrustedBatch, dict[str, Tensor], Tensor]]:
    """One pass: each batch, the results of `read` on the activation of each site, and the predictions (B,)."""
    model.to(compute.torch_device).eval()
    for batch in inputs.untrusted_batches():
        results: dict[str, Tensor] = {}

        def keep(site: Site, y_B: Tensor, batch: UntrustedBatch = batch, results: dict[str, Tensor] = results) -> None:
            # `read` is called in the hook, and copies: an in-place ReLU that follows would overwrite the activation.
            results[site.name] = read(y_B, batch)

        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(watching(model, list(sites), keep))
            stack.enter_context(compute.autocast())
            predictions_B = model(inputs.config.normalise(batch.images_BCHW.to(compute.torch_device))).argmax(1)
        yield batch, results, predictions_B


def sample_features(
    model: nn.Module, sites: Sequence[Site], inputs: RepairInputs, pooling: Pooling, size: int, compute: Compute
) -> FeatureSample:
    """Pooled features of a bounded sample; one pass over the untrusted data.

    Raises:
        NumericsError: a feature is not finite.
        DataError: there is no data.
    """
    sample = HashSample(size)
    widths: dict[str, int] = {}
    has_truth = True
    passes = seen(model, sites, inputs, lambda y_B, batch: pool(y_B, pooling, batch.hashes).float(), compute)
    for batch, pooled, predictions_B in passes:
        widths = {name: z_BP.shape[1] for name, z_BP in pooled.items()}
        has_truth &= batch.poisoned_B is not None
        poisoned_B = torch.zeros(len(batch.hashes)) if batch.poisoned_B is None else batch.poisoned_B
        columns = [predictions_B[:, None].float(), poisoned_B[:, None].to(predictions_B.device).float()]
        sample.update(batch.hashes, torch.cat([*columns, *pooled.values()], 1).cpu())
    if not len(sample):
        raise DataError("the untrusted data is empty; give shards with samples")
    rows = sample.rows()
    if not rows.isfinite().all():
        raise NumericsError("features of the untrusted data are not finite; check the model's weights")
    predictions_N1, poisoned_N1, *features = rows.split([1, 1, *widths.values()], 1)
    pooled = {name: z_NP.double() for name, z_NP in zip(widths, features, strict=True)}
    truth_N = poisoned_N1[:, 0] > 0 if has_truth else None
    head = next((site.name for site in sites if site.side == "input"), None)
    return FeatureSample(pooled, predictions_N1[:, 0].long(), truth_N, head)


Groups = Callable[[dict[str, Tensor], Tensor], Tensor]  # pooled features by site, predictions (B,) -> group (B,)


def group_moments(
    model: nn.Module, sites: Sequence[Site], inputs: RepairInputs, groups: Groups, compute: Compute
) -> dict[str, dict[int, Moments]]:
    """One pass: moments of the features at all positions, of each site and of each group of samples.

    Args:
        model: the network.
        sites: sites of the network.
        inputs: the untrusted data.
        groups: function from `max_mean` pooled features and predictions to the group of each sample.
        compute: device and precision.
    """
    moments: dict[str, dict[int, Moments]] = {site.name: {} for site in sites}
    pooled: dict[str, Tensor] = {}
    for batch, activations, predictions_B in seen(model, sites, inputs, lambda y_B, _batch: y_B.clone(), compute):
        pooled = {name: pool(y_B, "max_mean", batch.hashes) for name, y_B in activations.items()}
        group_B = groups(pooled, predictions_B)
        for name, y_B in activations.items():
            for group in group_B.unique().tolist():
                rows = channels_last(y_B)[group_B == group].flatten(0, -2)
                moments[name].setdefault(group, Moments(rows.shape[1])).merge(moments_of(rows))
    return moments


def moments_of(rows_ND: Tensor) -> Moments:
    """Moments of rows, computed on their device and moved to the CPU."""
    rows_ND = rows_ND.double()
    moments = Moments(rows_ND.shape[1])
    moments.count = len(rows_ND)
    mean_D = rows_ND.mean(0)
    moments.mean_D, moments.scatter_DD = mean_D.cpu(), ((rows_ND - mean_D).T @ (rows_ND - mean_D)).cpu()
    return moments


def separation_constant(z_NP: Tensor, poisoned_N: Tensor) -> float:
    """C of assumption 2: squared distance of the two means over the largest eigenvalue of the two covariances."""
    poisoned, benign = z_NP[poisoned_N], z_NP[~poisoned_N]
    if min(len(poisoned), len(benign)) < 2:
        return float("nan")
    largest = max(float(torch.linalg.eigvalsh(part.T.cov())[-1]) for part in (poisoned, benign))
    return float((poisoned.mean(0) - benign.mean(0)).square().sum()) / max(largest, 1e-12)
