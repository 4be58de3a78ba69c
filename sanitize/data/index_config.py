"""Requirements on samples: settings of the index."""

import re
from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sanitize.data.class_names import MAX_NAMES, ClassNames, names_beside
from sanitize.data.decode import ImageConfig
from sanitize.data.image_facts import FACTS_VERSION
from sanitize.data.labels import MAX_CLASSES, LabelReader
from sanitize.data.samples import ALL, SampleLimits
from sanitize.errors import ConfigError

_NO_LABELS = "none"
_PLACE = re.compile(r"[^:.][^:]*|([^:.][^:]*\.)?json:.+|table:.+", re.DOTALL)
_PLACE_OF_HASH = re.compile(r"(json|table):.+", re.DOTALL)


class IndexConfig(BaseModel):
    """Requirements on samples.

    Attributes:
        check: depth of the check. "decode": each image is decoded, so that later stages can read all `ok` samples.
            "digest": images are hashed, not decoded. "headers": only labels are read, and no byte is hashed; a changed
            shard is then recognised by its size and modification time.
        label: place of the class. The suffix of a member ("cls", "output.cls") with an ASCII integer or an exact
            one-hot vector; "json:FIELD" or "json:A.B.C" for a path; "table:FILE#COLUMN" for a CSV or Parquet file with
            a column `key`. None or "none" reads no labels: all samples are of class 0.
        n_classes: number of classes; None takes the largest label below 1,000, plus one.
        classes: "names" if labels are class names: the classes are the sorted names, and `dataset.json` lists them. A
            list of names gives their order. None for integers.
        class_names: names of integer classes, by number, to show to people; no result depends on them. None takes those
            of `classes.json` beside the shards (label "cls"), as `sanitize import` writes it; {} leaves names out.
        image: settings of decoding.
        limits: limits on the cost of one sample.
        max_bad_fraction: share of unreadable samples in [0, 1] above which the run stops. The bytes behind the place
            where a shard is damaged count as so many samples as fit there.
        max_bad_shards: number of damaged shards without a usable sample above which the run stops: the number of
            samples in them is unknown.
        image_facts: True also takes facts about each decoded image (brightness, a perceptual hash, ...), which
            `check_hygiene` reads. They need check "decode".
        max_pictures: with `image.member: all`, number of pictures above which a sample is unreadable.
        verify: place of the hash of the image as stored: "json:FIELD", a field of the metadata, or "table:FILE#COLUMN",
            as for `label`. sha256, sha512, sha1 or md5 in hexadecimal, known by its length. An image with another hash
            stays usable; `check_hygiene` lists it, and images whose key has no row in the table, or several.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: Literal["decode", "digest", "headers"] = "decode"
    label: str | None = "cls"
    n_classes: int | None = Field(default=None, gt=0)
    classes: Literal["names"] | tuple[str, ...] | None = None
    class_names: ClassNames | None = None
    image: ImageConfig = ImageConfig()
    limits: SampleLimits = SampleLimits()
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    max_bad_shards: int = Field(default=0, ge=0)
    image_facts: bool = False
    verify: str | None = None
    max_pictures: int = Field(default=32, gt=0)

    @model_validator(mode="after")
    def _reads_images(self) -> Self:
        if self.verify is not None and self.check == "headers":
            raise ConfigError("index.verify compares images with their hashes, and index.check=headers reads no image")
        if self.verify is not None and self.has_several:
            raise ConfigError(
                "index.verify names the hash of one image, and index.image.member=all reads several; set "
                "index.verify=null, or index.image.member to the suffix of that image"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """What the index depends on. Settings that came later are left out where they are off, so that an index from
        before them is still found."""
        settings = self.model_dump(mode="json")
        used = {name: settings[name] for name in ("image_facts", "verify", "class_names")} | {
            "max_pictures": self.has_several
        }
        recipe = {name: value for name, value in settings.items() if used.get(name, True)}
        return recipe | ({"image_facts": FACTS_VERSION} if self.image_facts else {})

    @property
    def has_several(self) -> bool:
        """True where every picture of a sample is read, and the index has one row a picture."""
        return self.image.member == ALL

    @property
    def has_table(self) -> bool:
        """True where labels are in a table."""
        return self.label is not None and self.label.startswith("table:")

    @property
    def has_facts(self) -> bool:
        """True where the index gets a table of facts about images."""
        return self.verify is not None or (self.image_facts and self.check == "decode")

    @field_validator("label")
    @classmethod
    def _is_place(cls, label: str | None) -> str | None:
        if label is None or label == _NO_LABELS:
            return None
        if not _PLACE.fullmatch(label):
            raise ValueError(
                f"{label!r} is no place of a label: the suffix of a member without its first dot (cls), json:FIELD, "
                "table:FILE#COLUMN, or none"
            )
        return label

    @field_validator("verify")
    @classmethod
    def _is_place_of_hash(cls, verify: str | None) -> str | None:
        if verify is not None and not _PLACE_OF_HASH.fullmatch(verify):
            raise ValueError(f"{verify!r} is no place of a hash: json:FIELD, or table:FILE#COLUMN")
        return verify

    @model_validator(mode="after")
    def _settings_of_labels(self) -> Self:
        for name, place in (("label", self.label), ("verify", self.verify)):
            if place is not None and place.startswith("table:") and "#" not in place[6:]:
                raise ConfigError(f"index.{name}={place} names no column: table:FILE#COLUMN")
        if isinstance(self.classes, tuple):
            if not self.classes or len(set(self.classes)) < len(self.classes) or len(self.classes) > MAX_NAMES:
                raise ConfigError(f"index.classes needs 1 to {MAX_NAMES:,} different names")
            if self.n_classes not in (None, len(self.classes)):
                raise ConfigError(f"index.classes has {len(self.classes)} names, and index.n_classes={self.n_classes}")
        if self.classes is not None and self.class_names:
            raise ConfigError("index.class_names names integer classes; with index.classes labels are names: set one")
        return self

    def named(self, urls: Iterable[str]) -> Self:
        """The same settings with the names of classes from beside the shards, unless the settings have names."""
        if self.class_names is not None or self.classes is not None or self.label != "cls":
            return self
        limit = self.n_classes or MAX_CLASSES
        names = {number: name for number, name in names_beside(urls).items() if number < limit}
        return self.model_copy(update={"class_names": names}) if names else self


def label_reader(config: IndexConfig) -> LabelReader:
    """The reader of labels of these settings. Raises as `LabelReader` does."""
    return LabelReader(config.label, config.n_classes, config.classes)
