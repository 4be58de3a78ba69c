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


def certified_poisons(votes_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The plurality's predictions, and how many inserted or removed training samples cannot change them.

    Args:
        votes_NK: votes for each of K >= 2 classes, integers.

    Returns:
        predictions_N, int64: most votes, of equals the smaller label. rho_N, int64, >= 0.
    """
    n_classes = votes_NK.shape[1]
    votes_NK = votes_NK.long()
    classes_K = torch.arange(n_classes, device=votes_NK.device)
    predictions_N = (votes_NK * n_classes - classes_K).argmax(1)  # all different, so there is one largest
    top_N = votes_NK.gather(1, predictions_N[:, None])[:, 0]
    ahead_NK = votes_NK + (classes_K < predictions_N[:, None])
    rival_N = ahead_NK.scatter(1, predictions_N[:, None], -1).amax(1)
    return predictions_N, (top_N - rival_N).div(2, rounding_mode="floor")
