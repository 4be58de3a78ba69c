"""Randomized smoothing (Cohen, Rosenfeld & Kolter, 2019): certified robustness of a classifier under Gaussian noise.

    g(x) = the class that f gives most often to x + e,   e ~ N(0, sigma^2 I)

The theorem: if f gives class A to x + e with a probability of at least p > 1/2, then g(x + d) = A for every
||d||_2 < sigma Phi^-1(p). `certify` bounds p from below by a sample (Algorithm CERTIFY), `predict` estimates g(x)
(Algorithm PREDICT); both err with a probability of at most alpha for each image, and abstain if the sample is not
conclusive.

The certificate is for g, so g must be deployed, not f. f includes its precision and its normalisation: at bfloat16 it
is another function than at float32, with other certificates. Radii are in the units of the inputs.

The noise of an image depends on the seed, its pixels and the kind of device, not on its place, the batch size or the
other images. The copies of an image are classified in blocks of 128 that hold no other image. On a CPU, a forward pass
is one block, so that the logits of a copy have the same bits for any batch size and other images. On a GPU, a forward
pass has the batch size, and a copy near a class border may be counted for the other class at another batch size. The
level alpha is a probability over the noise: it does not hold for an image that was chosen with knowledge of the seed.

Shapes: N images, G of them at once, X their shape with channels last, B copies in a batch, K classes.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.special
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import NumericsError

ABSTAINS = -1
_BLOCK = 128  # copies of one image drawn at a time; batches consist of whole blocks, possibly partly filled


class SmoothingConfig(BaseModel):
    """Noise, copies and level.

    Attributes:
        sigma: standard deviation of the noise, in the units of the inputs: pixels on [0, 1].
        n0: number of noisy copies that choose the class.
        n: number of further copies that bound its probability. The radius is at most sigma Phi^-1(alpha^(1/n)).
        alpha: probability with which the certificate of an image may be wrong.
        early_stop: True abstains after n/100 or n/10 copies if the upper Clopper-Pearson bound (level alpha) of the
            probability is below 1/2. The level stays alpha, because abstaining is never wrong and radii are computed
            from all n copies. An image that could be certified is abandoned with a probability of at most 2 alpha.
        batch_size: copies drawn at once, of several images if they have fewer; on a GPU, the size of a forward pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sigma: float = Field(default=0.25, gt=0)
    n0: int = Field(default=100, ge=1)
    n: int = Field(default=10_000, ge=1)
    alpha: float = Field(default=0.001, gt=0, lt=0.5)
    early_stop: bool = False
    batch_size: int = Field(default=4 * _BLOCK, gt=0, multiple_of=_BLOCK)

    @property
    def images_at_once(self) -> int:
        """Number of images whose copies share batches."""
        return max(1, self.batch_size // (self.n0 + self.n))


class Certified(NamedTuple):
    """Certificates of N images.

    Attributes:
        predictions_N: class, or -1 for abstentions; int64.
        radii_N: l2 radius below which g is constant; 0 for abstentions; float64.
        p_lower_N: lower bound of the probability of the class; 0 after an early stop; float64.
        n_top_N: number of the n copies that were classified as the class; int64.
        n_N: number of copies: `SmoothingConfig.n`, or fewer after an early stop; int64.
    """

    predictions_N: np.ndarray
    radii_N: np.ndarray
    p_lower_N: np.ndarray
    n_top_N: np.ndarray
    n_N: np.ndarray


def lower_bound(successes: np.ndarray | int, n: np.ndarray | int, alpha: float) -> np.ndarray:
    """The p at which so many successes of n, or more, have the probability alpha (Clopper & Pearson, 1934); float64.

    With a probability of at least 1 - alpha, the bound is not above the true p.
    """
    successes = np.asarray(successes)
    bound = scipy.special.betaincinv(np.maximum(successes, 1), n - successes + 1, alpha)
    return np.where(successes > 0, bound, 0.0)


def upper_bound(successes: np.ndarray | int, n: np.ndarray | int, alpha: float) -> np.ndarray:
    """The upper bound: one minus the lower bound of the failures."""
    return 1 - lower_bound(np.asarray(n) - successes, n, alpha)


def radius(p_lower: np.ndarray | float, sigma: float) -> np.ndarray:
    """sigma Phi^-1(p), float64; 0 for p <= 1/2."""
    return sigma * scipy.special.ndtri(np.maximum(p_lower, 0.5))


def certify(model: nn.Module, images_NX: Tensor, config: SmoothingConfig, compute: Compute) -> Certified:
    """Algorithm CERTIFY.

    Args:
        model: f, from float inputs in the units of sigma to logits (B, K) (`sanitize.models.pixels.OnPixels`); moved
            to the device and set to eval mode.
        images_NX: (N, C, H, W) or (N, D), in those units; uint8 images are scaled to [0, 1].
        config: noise and number of copies.
        compute: device, precision and seed.

    Raises:
        NumericsError: a logit is not finite.
    """
    compute.activate()
    groups = [_certify(model, images_GX, config, compute) for images_GX in images_NX.split(config.images_at_once)]
    return Certified(*(np.concatenate(arrays) for arrays in zip(*groups, strict=True)))


def predict(model: nn.Module, images_NX: Tensor, config: SmoothingConfig, compute: Compute) -> np.ndarray:
    """Algorithm PREDICT: the class of g, int64 (N,), or -1 if n copies do not separate the two most frequent classes.

    Arguments and errors are those of `certify`. A prediction other than -1 is wrong with a probability of at most
    alpha, by a two-sided binomial test of the two most frequent classes (Hung & Fithian, 2019).
    """
    compute.activate()
    predictions = []
    for images_GX in images_NX.split(config.images_at_once):
        copies = _NoisyCopies(model, images_GX, config, compute, "predict")
        counts_GK = copies.count([(i, config.n) for i in range(len(images_GX))])
        second_G, first_G = np.sort(counts_GK, 1)[:, -2:].T
        # P(at least `first` heads of first + second throws), twice.
        p_value_G = 2 * scipy.special.betainc(first_G, second_G + 1, 0.5)
        predictions.append(np.where(p_value_G <= config.alpha, counts_GK.argmax(1), ABSTAINS))
    return np.concatenate(predictions)


def _certify(model: nn.Module, images_GX: Tensor, config: SmoothingConfig, compute: Compute) -> Certified:
    n_images, sizes = len(images_GX), _sample_sizes(config)
    copies = _NoisyCopies(model, images_GX, config, compute, "certify")
    # The copies that choose the class and the first counted ones, which are other copies, share batches.
    counts = copies.count([(i, n) for n in (config.n0, sizes[0]) for i in range(n_images)])
    top_G = counts[:n_images].argmax(1)
    n_top_G, n_G = counts[n_images:][np.arange(n_images), top_G], np.full(n_images, sizes[0])
    for n_before, n_after in pairwise(sizes):
        going_G = (n_G == n_before) & (upper_bound(n_top_G, n_G, config.alpha) >= 0.5)
        if not going_G.any():
            break
        counts = copies.count([(i, n_after - n_before) for i in going_G.nonzero()[0].tolist()])
        n_top_G[going_G] += counts[np.arange(len(counts)), top_G[going_G]]
        n_G[going_G] = n_after
    p_lower_G = np.where(n_G == config.n, lower_bound(n_top_G, n_G, config.alpha), 0.0)
    predictions_G = np.where(p_lower_G > 0.5, top_G, ABSTAINS)
    return Certified(predictions_G, radius(p_lower_G, config.sigma), p_lower_G, n_top_G, n_G)


def _sample_sizes(config: SmoothingConfig) -> list[int]:
    """Numbers of copies after which early stopping is tested; the last one is n."""
    return [n for n in (config.n // 100, config.n // 10) if n and config.early_stop] + [config.n]


class _NoisyCopies:
    """Draws noisy copies of a few images and counts their predicted classes.

    Memory is one buffer of `batch_size` copies for any n. Each image has its own generator, which continues from one
    call of `count` to the next.
    """

    def __init__(
        self, model: nn.Module, images_GX: Tensor, config: SmoothingConfig, compute: Compute, stream: str
    ) -> None:
        device = compute.torch_device
        self._model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        images_GX = images_GX / 255 if images_GX.dtype == torch.uint8 else images_GX.float()
        images_GX = images_GX.cpu().movedim(1, -1).contiguous()  # channels last: the model gets a channels_last view
        digests = [hashlib.sha256(image_X.numpy().tobytes()).hexdigest() for image_X in images_GX]
        self._generators = [compute.generator("smoothing", stream, digest, device=device) for digest in digests]
        self._images_GX = images_GX.to(device)
        self._noisy_BX = torch.zeros(config.batch_size, *images_GX.shape[1:], device=device)
        self._config, self._compute = config, compute

    @torch.inference_mode()
    def count(self, wanted: Sequence[tuple[int, int]]) -> np.ndarray:
        """Counts of the predicted classes for each (image, number of new copies), int64 (len(wanted), K)."""
        counts = torch.zeros((), dtype=torch.int64, device=self._noisy_BX.device)
        finite = torch.ones((), dtype=torch.bool, device=self._noisy_BX.device)
        blocks = [(row, n) for row, (_, n_copies) in enumerate(wanted) for n in _sizes(n_copies)]
        per_batch = self._config.batch_size // _BLOCK
        for batch in (blocks[i : i + per_batch] for i in range(0, len(blocks), per_batch)):
            drawn = torch.cat([torch.arange(i * _BLOCK, i * _BLOCK + n) for i, (_, n) in enumerate(batch)])
            self._draw([(wanted[row][0], n) for row, n in batch])
            logits_BK = self._logits(len(batch))[drawn.to(self._noisy_BX.device, non_blocking=True)]
            n_classes = logits_BK.shape[1]
            rows_B = torch.from_numpy(np.repeat(*np.array(batch).T)).to(logits_BK.device, non_blocking=True)
            cells_B = rows_B * n_classes + logits_BK.argmax(1)
            counts = counts + torch.bincount(cells_B, minlength=len(wanted) * n_classes)
            finite &= logits_BK.isfinite().all()
        if not finite:
            raise NumericsError(f"a logit of the model is not finite under noise of sigma={self._config.sigma}")
        return counts.view(len(wanted), -1).cpu().numpy()

    def _draw(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Fill the buffer with noisy copies, one block after another."""
        for noisy_bX, (image, n) in zip(self._noisy_BX.split(_BLOCK), blocks, strict=False):
            noisy_bX[:n].normal_(0, self._config.sigma, generator=self._generators[image])
            noisy_bX[:n] += self._images_GX[image]

    def _logits(self, n_blocks: int) -> Tensor:
        """Logits of all rows of the first blocks of the buffer, filled or not."""
        on_cpu = self._noisy_BX.device.type == "cpu"
        x_BX = (self._noisy_BX[: n_blocks * _BLOCK] if on_cpu else self._noisy_BX).movedim(-1, 1)
        with self._compute.autocast():
            return torch.cat([self._model(x_bX) for x_bX in x_BX.split(_BLOCK if on_cpu else len(x_BX))])


def _sizes(n_copies: int) -> list[int]:
    """Number of copies in each block of an image."""
    return [min(_BLOCK, n_copies - start) for start in range(0, n_copies, _BLOCK)]
