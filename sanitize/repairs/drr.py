"""Directional Rank Reduction (DRR): project out the direction along which a backdoor moves the features.

The toxic direction is the difference between the mean features of poisoned and benign samples. Both means are unknown,
so the direction is estimated from the features of the untrusted training data.

`third_moment`, as in the paper: orthonormal columns V that maximise sum_j E[(v_j^T (x - mean))^3] on the Stiefel
manifold (theorem 1: for well separated clusters V points along the difference of their means). Columns with a skewness
above `tau` are projected out, P = I - V V^T, and the mean is kept.

`clusters`, our method: poison is a tight second cluster of the samples that are *predicted* as one class. Each class is
split along the direction on which two Gaussians explain it best (`sanitize.score.toxic_direction`). If the separation
of the parts, measured on held-out samples, exceeds `min_separation`, the smaller or tighter part is suspicious. V spans
the differences between the means of the suspicious parts and of all other samples, over positions. A blended trigger
moves every position a little: the split detects that, the third moment does not.

`oblique`: with the benign covariance Sigma, P = I - V (V^T A V)^-1 V^T A with A = (Sigma + ridge)^-1 removes the same
shifts, and among all projections that do so changes the benign features least in the metric of A (the closed form of
concept erasure: Belrose et al. 2023, "LEACE"). `orthogonal` is the projection of the paper.

Shapes: N samples, D features of a site, P pooled features, k directions, S starts.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import ConfigError
from sanitize.repairs.inputs import BaseRepairConfig, Needs, Repair, Repaired, RepairInputs
from sanitize.repairs.observe import FeatureSample, group_moments, sample_features, separation_constant
from sanitize.repairs.sites import Projection, Site, find_sites, fold
from sanitize.repairs.third_moment import Directions, of_every_class, third_moment_directions
from sanitize.score.toxic_direction import ClassSplit, SplitConfig, fit_class, log_odds
from sanitize.score.toxic_direction.sides import EVEN
from sanitize.score.toxic_direction.two_gaussians import swapped
from sanitize.streaming import Moments

SMALL_CLASS = 500  # samples
_REST = -1  # group of all samples outside the second clusters


class DRRConfig(BaseRepairConfig):
    """Search for directions, and their projection.

    Attributes:
        search: clusters, or third_moment (the paper).
        projection: oblique, or orthogonal (the paper).
        layers: number of the last sites (`find_sites`), or names of sites. The last site is the input of the last
            Linear: every network has it, and no shortcut bypasses it. In the site before it the poison stands out more.
        rank: k, largest number of directions removed at a site.
        pooling: third_moment: reduction of a feature map to one row a sample: spatial maximum, mean, or a random
            position.
        tau: third_moment: skewness above which a direction is removed. Clean models stay below 2.
        per_class: third_moment: separate moments for each predicted class.
        n_starts, n_steps: third_moment: random starts, and retracted steps from each.
        min_separation: clusters: standard deviations between the parts of a class above which one part is poison.
            Clean classes of Fashion-MNIST reach 3.9. A smaller separation on the fitted samples counts as 0, without
            a measurement on held-out samples.
        small_class_separation: the same for classes of fewer than 500 samples, which separate more easily by chance.
        split: clusters: fit of the two parts of a class.
        ridge: oblique: constant added to the diagonal of Sigma, as a share of its mean eigenvalue.
        sample_size: samples whose pooled features are held in memory.
    """

    kind: Literal["drr"] = "drr"
    needs: ClassVar[Needs] = "untrusted"
    search: Literal["clusters", "third_moment"] = "clusters"
    projection: Literal["oblique", "orthogonal"] = "oblique"
    layers: PositiveInt | tuple[str, ...] = 2
    rank: int = Field(default=3, ge=1)
    pooling: Literal["max", "mean", "position"] = "max"
    tau: float = Field(default=2.0, gt=0)
    per_class: bool = False
    n_starts: int = Field(default=20, ge=1)
    n_steps: int = Field(default=50, ge=1)
    min_separation: float = Field(default=5.0, gt=0)
    small_class_separation: float = Field(default=7.6, gt=0)
    split: SplitConfig = SplitConfig()
    ridge: float = Field(default=0.03, gt=0)
    sample_size: int = Field(default=20_000, ge=100)

    def build(self) -> Repair:
        """The function `repair` with these settings."""
        return partial(repair, self)


def repair(config: DRRConfig, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
    """Project the toxic directions out, in a copy of the network.

    Raises:
        ConfigError: there is no untrusted data, `layers` names no site, or the network has none.
        NumericsError: features are not finite.
    """
    model = copy.deepcopy(model)
    sites = chosen_sites(model, inputs, config.layers)
    by_clusters = config.search == "clusters"
    sample = sample_features(
        model, sites, inputs, "max_mean" if by_clusters else config.pooling, config.sample_size, compute
    )
    start = time.perf_counter()
    found = _clusters(config, model, sample, compute) if by_clusters else _third_moments(config, sample, compute)
    seconds = time.perf_counter() - start
    removed = {} if found.is_empty else _removed(config, model, sites, inputs, found, compute)
    for site in sites:
        if site.name in removed:
            fold(model, site, removed[site.name])
    layers = [_row(site, sample, found, removed.get(site.name)) for site in sites]
    return Repaired(model.cpu().eval(), {"layers": layers}, {"search": seconds})


def _third_moments(config: DRRConfig, sample: FeatureSample, compute: Compute) -> "ThirdMoments":
    found = {}
    for name, x_ND in sample.pooled.items():
        generator = compute.generator("repair", "drr", name)
        steps = config.n_starts, config.n_steps, generator
        if config.per_class:
            found[name] = of_every_class(x_ND, sample.predictions_N, config.rank, config.tau, *steps)
        else:
            found[name] = third_moment_directions(x_ND, config.rank, *steps)
    return ThirdMoments(found, config.tau)


def _clusters(config: DRRConfig, model: nn.Module, sample: FeatureSample, compute: Compute) -> "Clusters":
    splits: dict[str, dict[int, ClassSplit]] = {}
    for name, z_NP in sample.pooled.items():
        splits[name] = {}
        for label in sample.predictions_N.unique().tolist():
            there_N = sample.predictions_N == label
            generator = compute.generator("repair", "drr", name, label)
            split = fit_class(z_NP[there_N], config.split, generator, at_least=config.min_separation)
            if sample.head is not None and EVEN <= split.minority_fraction <= 1 - EVEN:
                head = model.get_submodule(sample.head)
                at_head = sample.pooled[sample.head]
                split = side_by_head(head, at_head, split, z_NP, sample.predictions_N, label, config.ridge)
            splits[name][label] = split
    return Clusters(splits, config.min_separation, config.small_class_separation, config.rank)


class ThirdMoments(NamedTuple):
    """Directions of each site, and the skewness above which they are removed."""

    found: dict[str, Directions]
    tau: float

    @property
    def is_empty(self) -> bool:
        """True where no direction is removed at any site."""
        return all(not directions.above(self.tau).v_Dk.shape[1] for directions in self.found.values())

    def groups(self, _pooled: Mapping[str, Tensor], predictions_B: Tensor) -> Tensor:
        """Group -1 for all samples."""
        return torch.full_like(predictions_B, _REST)

    def directions(self, site: str, _moments: Mapping[int, Moments]) -> Tensor:
        """Directions with a skewness above tau, (D, k)."""
        return self.found[site].above(self.tau).v_Dk

    def criterion(self, site: str) -> dict[str, list[float]]:
        """Third moments and skewness, for the report."""
        directions = self.found[site]
        return {"third_moment": directions.moment_k.tolist(), "skewness": directions.skewness_k.tolist()}


class Clusters(NamedTuple):
    """Splits of the predicted classes, by name of the site and label of the class."""

    splits: dict[str, dict[int, ClassSplit]]
    min_separation: float
    small_class_separation: float
    rank: int

    @property
    def reference_site(self) -> str:
        """Name of the site with the largest separation of any class; its splits decide which samples are suspicious."""
        return max(self.splits, key=lambda name: max(split.separation for split in self.splits[name].values()))

    @property
    def suspicious(self) -> dict[int, ClassSplit]:
        """Splits of the classes with a second cluster, at the reference site."""
        return {
            label: split
            for label, split in self.splits[self.reference_site].items()
            if split.separation
            > (self.small_class_separation if split.n_samples < SMALL_CLASS else self.min_separation)
        }

    @property
    def is_empty(self) -> bool:
        """True where no class has a second cluster."""
        return not self.suspicious

    def groups(self, pooled: Mapping[str, Tensor], predictions_B: Tensor) -> Tensor:
        """Predicted class for samples of its second cluster, -1 for all others."""
        group_B = torch.full_like(predictions_B, _REST)
        for label, split in self.suspicious.items():
            there_B = predictions_B == label
            odds_B = log_odds(split, pooled[self.reference_site][there_B].cpu())
            group_B[there_B] = torch.where(odds_B.to(group_B.device) > 0, label, _REST)
        return group_B

    def directions(self, _site: str, moments: Mapping[int, Moments]) -> Tensor:
        """An orthonormal basis (D, k) of the largest part of the mean differences."""
        rest_D = moments[_REST].mean_D
        differences = [part.mean_D - rest_D for group, part in sorted(moments.items()) if group != _REST]
        u_Dk: Tensor = torch.linalg.svd(torch.stack(differences, 1), full_matrices=False).U
        return u_Dk[:, : self.rank]

    def criterion(self, site: str) -> dict[str, Any]:
        """Separations, and fractions of the suspicious parts, for the report."""
        separations = {str(label): split.separation for label, split in sorted(self.splits[site].items())}
        fractions = (
            {str(y): split.minority_fraction for y, split in self.suspicious.items()}
            if site == self.reference_site
            else {}
        )
        return {"separation": separations, "suspicious_fraction": fractions}


def chosen_sites(model: nn.Module, inputs: RepairInputs, layers: int | tuple[str, ...]) -> list[Site]:
    """The last `layers` sites, or the sites with these names. Raises ConfigError where there are none."""
    sites = find_sites(model, inputs.config.example())
    if isinstance(layers, int):
        if not sites:
            raise ConfigError("the network has no convolution or Linear that a projection folds into")
        return sites[-layers:]
    names = [site.name for site in sites]
    if unknown := [name for name in layers if name not in names]:
        raise ConfigError(f"layers: {', '.join(unknown)} cannot be folded into; there are {', '.join(names)}")
    return [site for site in sites if site.name in layers]


def oblique(v_Dk: Tensor, covariance_DD: Tensor, ridge: float) -> Tensor:
    """R (D, k) = A V (V^T A V)^-1 with A = (Sigma + ridge tr(Sigma) / D)^-1, the `Projection.read_Dk` of V."""
    n_features = len(covariance_DD)
    scale = covariance_DD.diag().mean().clamp(min=1e-12)
    a_DD = covariance_DD + ridge * scale * torch.eye(n_features, dtype=covariance_DD.dtype)
    read_Dk = torch.linalg.solve(a_DD, v_Dk)
    return read_Dk @ torch.linalg.inv(v_Dk.T @ read_Dk)


def side_by_head(
    head: nn.Module, x_ND: Tensor, split: ClassSplit, z_NP: Tensor, predictions_N: Tensor, label: int, ridge: float
) -> ClassSplit:
    """Choose the suspicious side of an even split, which has no smaller part, by the head.

    Each part in turn is treated as poison, and its direction is removed. Clean images keep other features of the class;
    poisoned images had no feature of the class but the trigger. So the part with the lower probability of the class
    after the removal is the poison.

    Args:
        head: the last Linear.
        x_ND: inputs of the head, of all classes.
        split: split of the samples that are predicted as `label`.
        z_NP: features of the split, of all classes.
        predictions_N: predicted classes.
        label: predicted class of the split samples.
        ridge: ridge of the oblique projection.

    Returns:
        The split, with its sides swapped where the other side is suspicious.
    """
    there_N = predictions_N == label
    upper_N = there_N.clone()
    upper_N[there_N] = log_odds(split, z_NP[there_N]) > 0
    confidences = []
    for part_N in (upper_N, there_N & ~upper_N):
        part, rest = x_ND[part_N], x_ND[~part_N]
        if min(len(part), len(rest)) < 2:
            return split
        v_D1 = torch.nn.functional.normalize(part.mean(0) - rest.mean(0), dim=0)[:, None]
        read_D1 = oblique(v_D1, rest.T.cov(correction=0), ridge)
        kept = part - (part - rest.mean(0)) @ read_D1 @ v_D1.T
        with torch.no_grad():
            confidences.append(float(head.cpu()(kept.float()).softmax(1)[:, label].mean()))
    if confidences[0] <= confidences[1]:
        return split
    return split._replace(mixture=swapped(split.mixture), minority_fraction=1 - split.minority_fraction)


def _removed(
    config: DRRConfig,
    model: nn.Module,
    sites: Sequence[Site],
    inputs: RepairInputs,
    found: ThirdMoments | Clusters,
    compute: Compute,
) -> dict[str, Projection]:
    """Projections of the sites where directions are removed; one pass over the data."""
    moments = group_moments(model, sites, inputs, found.groups, compute)
    removed = {}
    for site in sites:
        v_Dk = found.directions(site.name, moments[site.name])
        if v_Dk.shape[1]:
            rest = moments[site.name][_REST]
            covariance_DD = rest.covariance(ddof=0)
            read_Dk = oblique(v_Dk, covariance_DD, config.ridge) if config.projection == "oblique" else v_Dk
            removed[site.name] = Projection(v_Dk, read_Dk, rest.mean_D, covariance_DD)
    return removed


def _row(
    site: Site, sample: FeatureSample, found: ThirdMoments | Clusters, removed: Projection | None
) -> dict[str, Any]:
    """Row of the report on a site; `c` is the constant C of the paper, where the truth is known."""
    rank = 0 if removed is None else removed.removed_Dk.shape[1]
    row = {"site": site.name, "n_features": site.n_features, "removed": rank, "rank_spent": rank / site.n_features}
    if sample.poisoned_N is not None and sample.poisoned_N.any():
        row["c"] = separation_constant(sample.pooled[site.name], sample.poisoned_N)
    return row | found.criterion(site.name)
