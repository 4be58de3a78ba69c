"""Deep Partition Aggregation (Levine & Feizi, ICLR 2021): a few changed training samples change a few votes.

Every training sample belongs to one of k partitions, chosen by a hash of its content. One base model is trained on
each partition, and the prediction is the plurality of their votes. An inserted or removed sample affects one partition,
and so one vote. With n_c votes for the prediction c, it cannot change while at most

    rho = floor((n_c - max over c' != c of (n_c' + [c' < c])) / 2)

samples are inserted or removed: each takes at most one vote from c and gives it to c'; ties go to the smaller label.
Shapes: N samples, K classes, C H W image.
"""

import hashlib
import hmac
from typing import NamedTuple

import torch
from torch import Tensor


def content_digest(image_CHW: Tensor, label: int, key: bytes) -> bytes:
    """Keyed SHA-256 of a training sample: of its decoded pixels (uint8), their shape, and its label.

    Key and place of the sample do not count: an attacker could change those of all samples at once.
    """
    head = f"{tuple(image_CHW.shape)}/{label}/".encode()
    return hmac.digest(key, head + image_CHW.contiguous().numpy().tobytes(), hashlib.sha256)


def partition_of(digest: bytes, n_partitions: int) -> int:
    """The partition of a sample, in [0, n_partitions)."""
    return int.from_bytes(digest, "big") % n_partitions


class Vote(NamedTuple):
    """Predictions and certificates of N samples.

    Attributes:
        prediction: class with the most votes; on ties, the smaller label; int64.
        radius: number of inserted or removed training samples that cannot change the prediction; int64, >= 0.
        n_top: votes for the prediction; int64.
        n_rival: most votes for another class, plus one if that class wins ties; int64.
    """

    prediction: Tensor
    radius: Tensor
    n_top: Tensor
    n_rival: Tensor


def certified_poisons(votes_NK: Tensor) -> Vote:
    """The prediction of the plurality, and its certificate (Levine & Feizi 2021, Theorem 1).

    Args:
        votes_NK: votes for each of K >= 2 classes, integers.
    """
    n_classes = votes_NK.shape[1]
    votes_NK = votes_NK.long()
    classes_K = torch.arange(n_classes, device=votes_NK.device)
    prediction_N = (votes_NK * n_classes - classes_K).argmax(1)  # distinct values: the maximum is unique
    top_N = votes_NK.gather(1, prediction_N[:, None])[:, 0]
    ahead_NK = votes_NK + (classes_K < prediction_N[:, None])
    rival_N = ahead_NK.scatter(1, prediction_N[:, None], -1).amax(1)
    return Vote(prediction_N, (top_N - rival_N).div(2, rounding_mode="floor"), top_N, rival_N)
