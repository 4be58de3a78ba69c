"""Published detectors that train a network of their own: confusion training, ASSET, and a suspect model by SAM.

Each is rebuilt from its paper in about a page, smaller than there: networks of tens of thousands of weights, hundreds
of steps. What is simplified is in the docstrings. N samples of untrusted data, M trusted samples (images and labels
known to be clean, not part of the data), B batch, C H W image, K classes, D features.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.nn.functional import batch_norm, binary_cross_entropy_with_logits, cross_entropy

from sanitize.compute import Compute

CONFUSED_RATIO, LARGEST_RATIO = 5.0, 2.0  # likelihood ratios from which on CT takes a class for contaminated
_ROWS = 512  # of a forward pass without gradients


class Labelled(NamedTuple):
    """Images (N, C, H, W), float and normalised, and labels (N,)."""

    x_NCHW: Tensor
    y_N: Tensor


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of batches without end: all rows in random order, then again in another; the rest of a pass is left out."""
    size = min(size, n)
    while True:
        yield from torch.randperm(n, generator=generator)[: n // size * size].split(size)


def outputs(model: nn.Module, x_NCHW: Tensor) -> Tensor:
    """Outputs (N, K) in eval mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(x_BCHW) for x_BCHW in x_NCHW.split(_ROWS)])


def features(model: nn.Module, x_NCHW: Tensor) -> Tensor:
    """Inputs (N, D) of the last Linear layer in eval mode."""
    *_, head = (module for module in model.modules() if isinstance(module, nn.Linear))
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    try:
        outputs(model, x_NCHW)
    finally:
        hook.remove()
    return torch.cat(seen)


def extremes(model: nn.Module, x_NCHW: Tensor) -> list[np.ndarray]:
    """Largest and smallest normalised activation of every channel, what FLARE looks at (Hou et al., 2024).

    The inputs of each BatchNorm are normalised by its running mean and variance, so all layers have one scale.

    Returns:
        One array (N, 2 C) for each BatchNorm, in the order of the forward pass.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    seen: list[list[Tensor]] = [[] for _ in norms]

    def keep(kept: list[Tensor]) -> Callable[..., None]:
        def hook(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
            z_BCHW = batch_norm(inputs[0], norm.running_mean, norm.running_var, eps=norm.eps)
            kept.append(torch.cat([z_BCHW.amax((2, 3)), z_BCHW.amin((2, 3))], 1))

        return hook

    hooks = [norm.register_forward_pre_hook(keep(kept)) for norm, kept in zip(norms, seen, strict=True)]
    try:
        outputs(model, x_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept).numpy() for kept in seen]


def train_plainly(
    model: nn.Module, data: Labelled, n_steps: int, learning_rate: float, batch_size: int, compute: Compute, stream: str
) -> None:
    """Train in place by cross-entropy with Adam; the learning rate falls along a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    rows = batches(len(data.y_N), batch_size, compute.generator("published", stream))
    model.train()
    for _, rows_B in zip(range(n_steps), rows, strict=False):
        _descend(cross_entropy(model(data.x_NCHW[rows_B]), data.y_N[rows_B]), optimizer)
        schedule.step()


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train_by_sam(
    model: nn.Module,
    data: Labelled,
    n_steps: int,
    compute: Compute,
    radius: float = 0.05,
    learning_rate: float = 3e-3,
    batch_size: int = 128,
) -> None:
    """Sharpness-aware minimisation of the suspect's loss (Zhang et al., 2024, arXiv 2411.11525).

    Each step climbs by `radius` along the gradient, g / |g|, and descends from where it stood along the gradient found
    there: twice the cost of a plain step. The paper holds that the backdoor is learned more strongly. Optimizer and
    schedule (AdamW, one cycle) are those of the default suspect model; the paper has SGD.

    Args:
        model: network, trained in place.
        data: the untrusted data.
        n_steps: number of steps.
        compute: seed.
        radius: length of the climb, rho.
        learning_rate, batch_size: as for the suspect model.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_steps, pct_start=0.25)
    rows = batches(len(data.y_N), batch_size, compute.generator("published", "sam"))
    model.train()
    for _, rows_B in zip(range(n_steps), rows, strict=False):
        x_BCHW, y_B = data.x_NCHW[rows_B], data.y_N[rows_B]
        loss = cross_entropy(model(x_BCHW), y_B)
        gradients = torch.autograd.grad(loss, weights)
        length = torch.stack([gradient.norm() for gradient in gradients]).norm() + 1e-12
        climbs = [radius * gradient / length for gradient in gradients]
        with torch.no_grad():
            torch._foreach_add_(weights, climbs)
        optimizer.zero_grad()
        cross_entropy(model(x_BCHW), y_B).backward()
        with torch.no_grad():
            torch._foreach_sub_(weights, climbs)
        optimizer.step()
        schedule.step()


def confusion_training(
    build: Callable[[], nn.Module],
    data: Labelled,
    trusted: Labelled,
    n_classes: int,
    compute: Compute,
    kept_shares: tuple[float, ...] = (1.0, 0.5, 0.2),
    n_first_steps: int = 600,
    n_steps: int = 150,
    n_confusing_steps: int = 200,
    weight: float = 20.0,
    batch_size: int = 64,
) -> np.ndarray:
    """Confusion training (Qi et al., 2023): what still gets its label under wrong lessons is poison.

    A network learns the data, and then at the same time trusted samples with labels that are wrong and change from step
    to step. That destroys what it knows of images, not what it knows of a trigger. The samples of smallest loss are
    kept, the next round is trained on them, and so poison is concentrated. At the end, features of
    each class are whitened by the trusted samples and projected on two axes, and two Gaussians are compared with the
    one that holds the trusted samples. Where two are likelier by far, the samples that still get their label are
    removed.

    Simplified: 3 rounds of 350 to 800 steps of a small network, instead of 6 of thousands of steps of a ResNet-18; no
    classes are filled up with further samples; trusted samples weigh on the side of a Gaussian by majority, not
    in each step of the fit.

    Args:
        build: a new network.
        data: the untrusted data.
        trusted: clean samples of all classes.
        n_classes: K.
        compute: seed.
        kept_shares: share of the data, in (0, 1], that each round trains on.
        n_first_steps, n_steps: steps on the kept data, in the first and in later rounds.
        n_confusing_steps: steps with wrong labels, in each round.
        weight: weight of the trusted samples against the data in the loss of a mixed step, lambda.
        batch_size: samples of the data, and trusted samples, in a step.

    Returns:
        True for removed samples, (N,).
    """
    compute.seed_global("published", "confusion", "init")
    model, n, half = build(), len(data.y_N), len(trusted.y_N) // 2
    taught, held = (Labelled(trusted.x_NCHW[part], trusted.y_N[part]) for part in (slice(half), slice(half, None)))
    loss_N = torch.zeros(n)
    for number, share in enumerate(kept_shares):
        kept = loss_N.argsort(stable=True)[: max(batch_size, round(share * n))]
        subset = Labelled(data.x_NCHW[kept], data.y_N[kept])
        train_plainly(
            model, subset, n_steps if number else n_first_steps, 3e-3, 2 * batch_size, compute, f"confusion {number}"
        )
        _confuse(model, subset, taught, n_classes, n_confusing_steps, weight, batch_size, compute, number)
        logits_NK = outputs(model, data.x_NCHW)
        loss_N = cross_entropy(logits_NK, data.y_N, reduction="none")
    fits_N = (logits_NK.argmax(1) == data.y_N).numpy()
    z_ND, trusted_MD = features(model, data.x_NCHW).numpy(), features(model, held.x_NCHW).numpy()
    labels_N, labels_M = data.y_N.numpy(), held.y_N.numpy()
    classes = np.unique(labels_N)
    ratio_K = np.array([likelihood_ratio(z_ND[labels_N == k], trusted_MD[labels_M == k]) for k in classes])
    is_bad_K = (ratio_K > CONFUSED_RATIO) | ((ratio_K == ratio_K.max()) & (ratio_K > LARGEST_RATIO))
    return np.asarray(np.isin(labels_N, classes[is_bad_K]) & fits_N)


def _confuse(
    model: nn.Module,
    data: Labelled,
    trusted: Labelled,
    n_classes: int,
    n_steps: int,
    weight: float,
    batch_size: int,
    compute: Compute,
    number: int,
) -> None:
    """Steps with wrong labels for the trusted samples; the data join in every second one."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.7)
    random = compute.generator("published", "confusion labels", number)
    of_data, of_trusted = batches(len(data.y_N), batch_size, random), batches(len(trusted.y_N), batch_size, random)
    model.train()
    for step in range(n_steps):
        rows_B = next(of_trusted)
        shift_B = torch.randint(1, n_classes, rows_B.shape, generator=random)  # never the right label
        wrong_B = (trusted.y_N[rows_B] + shift_B) % n_classes
        if step % 2:
            loss = cross_entropy(model(trusted.x_NCHW[rows_B]), wrong_B)
        else:
            mixed_B = next(of_data)
            both = model(torch.cat([trusted.x_NCHW[rows_B], data.x_NCHW[mixed_B]]))
            confusing = cross_entropy(both[: len(rows_B)], wrong_B)
            loss = (weight * confusing + cross_entropy(both[len(rows_B) :], data.y_N[mixed_B])) / (weight + 1)
        _descend(loss, optimizer)


def likelihood_ratio(z_ND: np.ndarray, trusted_MD: np.ndarray) -> float:
    """Likelihood of two Gaussians over that of the trusted one, a sample (Qi et al., 2023, appendix): geometric mean.

    Args:
        z_ND: features of a class.
        trusted_MD: features of trusted samples of the class; with fewer than two the ratio is 1.
    """
    if len(trusted_MD) < 2 or len(z_ND) < 20:
        return 1.0
    values_D, vectors_DD = np.linalg.eigh(LedoitWolf().fit(trusted_MD).covariance_)  # few samples, many features
    whitener_DD = vectors_DD / np.sqrt(np.maximum(values_D, 0) + 1e-4)
    mean_D = trusted_MD.mean(0)
    axes = PCA(2, random_state=0).fit((z_ND - mean_D) @ whitener_DD)
    y_N2, trusted_M2 = (axes.transform((rows - mean_D) @ whitener_DD) for rows in (z_ND, trusted_MD))
    distance_N = np.linalg.norm(y_N2 - trusted_M2.mean(0), axis=1)
    outer_N = distance_N >= np.quantile(distance_N, 0.9)
    start = np.stack([trusted_M2.mean(0), y_N2[outer_N].mean(0)])
    mixture = GaussianMixture(2, means_init=start, weights_init=[0.9, 0.1], random_state=0).fit(y_N2)
    clean = int(np.bincount(mixture.predict(trusted_M2), minlength=2).argmax())
    each_N2 = np.stack(
        [
            multivariate_normal.logpdf(y_N2, mixture.means_[side], mixture.covariances_[side], allow_singular=True)
            for side in (0, 1)
        ],
        1,
    )
    gain_N = each_N2[np.arange(len(y_N2)), mixture.predict(y_N2)] - each_N2[:, clean]
    return float(np.exp(min(gain_N.mean(), 50.0)))  # bounded: a far cluster would overflow


def asset(
    build: Callable[[], nn.Module],
    data: Labelled,
    trusted: Labelled,
    suspect: nn.Module,
    compute: Compute,
    n_passes: int = 3,
    n_inner_steps: int = 10,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
) -> np.ndarray:
    """ASSET, active separation by offset (Pan et al., 2023): two offsets, one inside the other.

    Outer offset: a new network is trained to give trusted samples outputs without variance, and at the same time a high
    loss to samples that look poisoned. Clean data follow the trusted samples; poison does not. Inner offset: which
    samples of a batch look poisoned is decided by a small perceptron on features of the suspect model that learns to
    tell the batch from trusted samples; only outliers among its answers count. Losses above what the lower half
    of all losses leads to expect are removed.

    Simplified: outliers are counted by the median absolute deviation, not by the medcouple; the features are computed
    once; one perceptron learns on from batch to batch, where the paper begins anew and takes 100 steps.

    Args:
        build: a new network.
        data: the untrusted data.
        trusted: clean samples.
        suspect: model trained on the untrusted data.
        compute: seed.
        n_passes: passes over the data.
        n_inner_steps: steps of the perceptron, for each batch.
        batch_size: samples of the data, and trusted samples, in a step.
        learning_rate: learning rate of both, Adam.

    Returns:
        True for removed samples, (N,).
    """
    compute.seed_global("published", "asset", "init")
    model, n = build(), len(data.y_N)
    z_ND, z_MD = features(suspect, data.x_NCHW), features(suspect, trusted.x_NCHW)
    mean_D, deviation_D = z_MD.mean(0), z_MD.std(0) + 1e-6
    z_ND, z_MD = (z_ND - mean_D) / deviation_D, (z_MD - mean_D) / deviation_D
    down = torch.optim.Adam(model.parameters(), learning_rate)
    up = torch.optim.Adam(model.parameters(), learning_rate)
    perceptron = nn.Sequential(nn.Linear(z_ND.shape[1], 64), nn.ReLU(), nn.Linear(64, 1))
    inner = torch.optim.Adam(perceptron.parameters(), learning_rate)
    random = compute.generator("published", "asset")
    of_data, of_trusted = batches(n, batch_size, random), batches(len(trusted.y_N), batch_size, random)
    for _ in range(n_passes * (n // batch_size)):
        rows_B, clean_B = next(of_data), next(of_trusted)
        model.train()
        _descend(model(trusted.x_NCHW[clean_B]).var(1).mean(), down)
        odd_B = _unlike(z_ND[rows_B], z_MD[clean_B], perceptron, inner, n_inner_steps)
        if odd_B.sum() > 1:  # a BatchNorm needs two
            odd = rows_B[odd_B]
            _descend(-cross_entropy(model(data.x_NCHW[odd]), data.y_N[odd]), up)
    loss_N = cross_entropy(outputs(model, data.x_NCHW), data.y_N, reduction="none").numpy()
    return loss_N > threshold_of_lower_half(loss_N)


def _unlike(
    z_BD: Tensor, trusted_BD: Tensor, perceptron: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int
) -> Tensor:
    """True for samples that the perceptron tells from trusted ones far better than the rest of the batch, (B,)."""
    both, is_data = torch.cat([z_BD, trusted_BD]), torch.cat([torch.ones(len(z_BD)), torch.zeros(len(trusted_BD))])
    for _ in range(n_steps):
        _descend(binary_cross_entropy_with_logits(perceptron(both)[:, 0], is_data), optimizer)
    with torch.no_grad():
        answer_B = perceptron(z_BD)[:, 0]
    above_B = answer_B - answer_B.median()
    return above_B > 3 * 1.4826 * above_B.abs().median()


def threshold_of_lower_half(loss_N: np.ndarray, density: float = 1e-3) -> float:
    """Where a Gaussian with the shape of the lower half of the losses, mirrored, has fallen to a density.

    Pan et al. (2023). The upper half may hold poison and does not count.
    """
    median = float(np.median(loss_N))
    deviation = float(np.sqrt(np.mean((loss_N[loss_N <= median] - median) ** 2))) + 1e-12
    return median + deviation * float(np.sqrt(max(0.0, -2 * np.log(density * deviation * np.sqrt(2 * np.pi)))))
