"""Thumbnails of samples: decoded like any other image, then encoded as small PNGs.

Thumbnails of a cleaning run are read from the written shards, because source shards may be gone. A picture is shown
only if its bytes are the indexed ones: quarantine may hold several samples of one key.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from sanitize.data.dataset import Dataset
from sanitize.data.decode import BadImage, ImageConfig, decode, encode_png, resized
from sanitize.data.samples import SampleLimits, ShardReader
from sanitize.errors import SanitizeError
from sanitize.select.write import Shards
from sanitize.tar.names import printable

BUDGET = 1_150_000  # bytes of all thumbnails of suspicious samples together, before base64
SIDES = (128, 112, 96, 80, 64, 48, 32, 24)  # of a thumbnail in pixels, tried until it fits its share of the budget

Thumbnail = tuple[bytes, int, int]  # PNG, width, height


def pictures(
    samples: Sequence[dict[str, Any]],
    dataset: Dataset,
    place: Callable[[str, str], str],
    budget: int = BUDGET,
    sides: Sequence[int] = SIDES,
) -> list[Thumbnail | None]:
    """A thumbnail of each sample; None if its image is not found.

    Args:
        samples: shard, position and status ("kept" or "quarantined") of each; a sample may be there twice.
        dataset: all samples.
        place: path or URL of a shard that holds the samples of this status (`written` for the output of `clean`).
        budget: bytes of all thumbnails together.
        sides: largest sides of a thumbnail in pixels, tried until it fits its share of the budget.
    """
    wanted: dict[tuple[str, str], list[int]] = {}
    for i, sample in enumerate(samples):
        wanted.setdefault((sample["shard"], sample["status"]), []).append(i)
    config = ImageConfig.model_validate(dataset.info["image"])
    limits = SampleLimits.model_validate(dataset.info["limits"])
    found: list[Thumbnail | None] = [None] * len(samples)
    for (shard, status), group in sorted(wanted.items()):
        rows = _index_rows(dataset, shard, [samples[i]["position"] for i in group])
        missing: dict[tuple[str, str], list[int]] = {}
        for row, i in zip(rows, group, strict=True):
            missing.setdefault((row["key"], row["sha256"]), []).append(i)
        for key, data in _payloads(place(shard, status), limits, {row["key"] for row in rows}):
            if (found_here := (key, hashlib.sha256(data).hexdigest())) in missing:
                picture = thumbnail(data, config, budget // len(samples), sides)
                for i in missing.pop(found_here):
                    found[i] = picture
            if not missing:
                break
    return found


def written(shards: Shards) -> Callable[[str, str], str]:
    """Where `write_selected` put the samples of a shard, by their status."""
    return lambda shard, status: shards.url(f"{'clean' if status == 'kept' else 'quarantine'}/{shard}")


def _index_rows(dataset: Dataset, shard: str, positions: list[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = dataset.rows(shard, ["key", "sha256"]).take(positions).to_pylist()
    return rows


def _payloads(path: str, limits: SampleLimits, keys: set[str]) -> Iterator[tuple[str, bytes]]:
    """(key, payload) of the members of the samples with these keys; nothing from an unreadable shard."""
    try:
        for sample in ShardReader(path, limits):
            if (key := printable(sample.key)) in keys:
                yield from ((key, data) for _, data in sample.members)
    except (SanitizeError, OSError):
        return


def thumbnail(data: bytes, config: ImageConfig, max_bytes: int, sides: Sequence[int] = SIDES) -> Thumbnail | None:
    """The image as PNG, at most `sides[0]` pixels high and wide, smaller to stay within `max_bytes`; never enlarged."""
    try:
        image_CHW = decode(data, config)
    except BadImage:
        return None
    png, small_CHW = b"", image_CHW
    for side in sides:
        small_CHW = shrink(image_CHW, side)
        png = encode_png(small_CHW)
        if len(png) <= max_bytes:
            break
    return png, small_CHW.shape[2], small_CHW.shape[1]


def shrink(image_CHW: Tensor, side: int) -> Tensor:
    """Fit the longer side into `side` pixels; an image that fits is returned as it is."""
    height, width = image_CHW.shape[1:]
    scale = side / max(height, width)
    if scale >= 1:
        return image_CHW
    return resized(image_CHW, (max(1, round(height * scale)), max(1, round(width * scale))))
