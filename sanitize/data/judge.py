"""The verdict on one sample: usable, or the reason why it is not. `IndexConfig.check` sets the depth of the check."""

import hashlib
from collections import Counter
from typing import Any

from sanitize.data.decode import BadImage, decode_pixels, image_format
from sanitize.data.image_facts import ImageFacts, reduced
from sanitize.data.index_config import IndexConfig
from sanitize.data.labels import BadLabel, LabelReader
from sanitize.data.layout import dots
from sanitize.data.samples import Sample, image_names
from sanitize.data.stated_hashes import StatedHashes
from sanitize.tar.names import printable


def judge_sample(
    sample: Sample,
    position: int,
    config: IndexConfig,
    labels: LabelReader,
    formats: Counter[str],
    facts: ImageFacts | None,
    hashes: StatedHashes | None,
) -> list[dict[str, Any]]:
    """Rows of a sample: status, the reason where it is not "ok", and properties; one for each image that is read.

    A sample with a bad image is unreadable, as a whole and in one row: nobody has looked at that image.

    Args:
        sample: the sample.
        position: number of its first row.
        config: requirements on samples.
        labels: reader of its label.
        formats: the formats of the images that are read are counted in it.
        facts: facts about the images of usable samples are added to it.
        hashes: images are compared with them, and what differs is added to `facts`.
    """
    if sample.problem is not None:
        return [{"status": "unreadable", "reason": sample.problem}]
    found: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    seen: list[Any] = []  # what facts are taken of: decoded images, or what is kept of them
    payloads = dict(sample.members)
    try:
        for name in _image_names(sample, config, labels):
            found = {"image": printable(name)}
            if config.check != "headers":
                found["sha256"] = hashlib.sha256(payloads[name]).hexdigest()
                formats[image_format(payloads[name]) or "unknown"] += 1
            found["label"] = rows[0]["label"] if rows else labels.read(sample)
            if config.check == "decode":
                pixels_HWC = decode_pixels(payloads[name], config.image)
                found["height"], found["width"] = pixels_HWC.shape[:2]
                if facts is not None and config.image_facts:
                    seen.append(reduced(pixels_HWC) if config.has_several else pixels_HWC)
            rows.append(found | {"status": "ok"})
    except (LookupError, BadLabel, BadImage) as error:
        reason = str(error.args[0])
        if config.has_several and isinstance(error, BadImage):
            reason = f"'{found['image']}': {reason}"
        return [found | {"status": "unreadable", "reason": reason}]
    if facts is not None:
        for i, image in enumerate(seen):
            facts.add(position + i, image)
        if hashes is not None:
            facts.add_stated(position, hashes.differing(sample, payloads[name]))
    return rows


def _image_names(sample: Sample, config: IndexConfig, labels: LabelReader) -> list[str]:
    names = [name for name, _ in sample.sizes]
    try:
        images = image_names(names, config.image.member)
    except LookupError as error:
        raise LookupError((labels.reads_members and dots(names, labels.suffix)) or error.args[0]) from None
    if config.has_several and len(images) > config.max_pictures:
        raise LookupError(f"{len(images)} pictures, more than index.max_pictures={config.max_pictures}")
    return images
