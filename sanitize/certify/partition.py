"""Deep Partition Aggregation (Levine & Feizi, ICLR 2021): who may change a few training samples changes a few votes.

Every training sample belongs to one of k partitions, named by a hash of its content; one base model is trained on each,
and the prediction is what most of them say. A sample that is inserted or removed touches one partition, so one vote.
With n_c votes for the prediction c, it cannot change while at most

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
    """Keyed SHA-256 of a training sample: of its pixels (uint8) as they are decoded, their shape, and its label.

    Not of its key or place: those an attacker could change for all samples at once.
    """
    head = f"{tuple(image_CHW.shape)}/{label}/".encode()
    return hmac.digest(key, head + image_CHW.contiguous().numpy().tobytes(), hashlib.sha256)


def partition_of(digest: bytes, n_partitions: int) -> int:
    """The partition of a sample, in [0, n_partitions)."""
    return int.from_bytes(digest, "big") % n_partitions


class Vote(NamedTuple):
    """What N votes say.

    Attributes:
        prediction: most votes, of equals the smaller label; int64.
        radius: so many inserted or removed training samples cannot change it; int64, >= 0.
        n_top: votes for it, int64.
        n_rival: the most votes for another class, plus one where that class would win a tie; int64.
    """

    prediction: Tensor
    radius: Tensor
    n_top: Tensor
    n_rival: Tensor


def certified_poisons(votes_NK: Tensor) -> Vote:
    """The plurality's prediction, and its certificate (Levine & Feizi 2021, Theorem 1).

    Args:
        votes_NK: votes for each of K >= 2 classes, integers.
    """
    n_classes = votes_NK.shape[1]
    votes_NK = votes_NK.long()
    classes_K = torch.arange(n_classes, device=votes_NK.device)
    prediction_N = (votes_NK * n_classes - classes_K).argmax(1)  # all different, so there is one largest
    top_N = votes_NK.gather(1, prediction_N[:, None])[:, 0]
    ahead_NK = votes_NK + (classes_K < prediction_N[:, None])
    rival_N = ahead_NK.scatter(1, prediction_N[:, None], -1).amax(1)
    return Vote(prediction_N, (top_N - rival_N).div(2, rounding_mode="floor"), top_N, rival_N)
