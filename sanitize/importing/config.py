"""Settings of an import."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sanitize.data.decode import ImageConfig
from sanitize.errors import ConfigError
from sanitize.importing.source import MAX_CLASS_NAME, MAX_CLASSES

Kind = Literal["folders", "csv", "coco", "parquet"]


class ImportConfig(BaseModel):
    """Settings of an import.

    Attributes:
        kind: "folders" (CLASS/NAME.jpg), "csv" (a table of paths and labels, .csv or .tsv), "coco" (captions), or
            "parquet" (also the Arrow files of a folder by `datasets`). None looks at what is there.
        images: folder or URL that the paths of a table, or of COCO's `file_name`, start from; None takes the folder of
            that file.
        image_column, label_column: columns of a table or of Parquet files; None finds them by type and name. Columns of
            a table without a header are 0, 1, ...
        classes: names of all classes, in the order of their integers; images of other classes are refused. None numbers
            the names that are found. With `kind: folders`, a sample then depends on its own file alone, as poisoning
            certificates need; links are refused.
        header: False for a table whose first line is a row.
        split: name of the split to import ("train"), or "all", where the source has several.
        samples_per_shard: largest number of samples of a shard.
        bytes_per_shard: size of the images of a shard in bytes above which the next shard begins.
        shuffle: True mixes the samples, and with them the classes, over all shards; False keeps the sorted order.
        name: beginning of the names of shards.
        image: limits of decoding; see `index.image`.
        max_image_bytes: size of an encoded image above which it is refused.
        max_row_group_bytes: size of the images in one row group of a Parquet file, which is held in memory.
        max_table_bytes, max_json_bytes: size of a table, and of COCO's annotations.
        max_samples: number of images that a source may offer; each takes about 300 bytes of memory.
        max_refused_fraction: share of refused images in [0, 1] above which the import fails.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind | None = None
    images: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    classes: tuple[str, ...] | None = None
    header: bool = True
    split: str | None = None
    samples_per_shard: int = Field(default=1000, ge=1)
    bytes_per_shard: int = Field(default=256 * 2**20, ge=1)
    shuffle: bool = True
    name: str = Field(default="train", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    image: ImageConfig = ImageConfig()
    max_image_bytes: int = Field(default=64 * 2**20, ge=1)
    max_row_group_bytes: int = Field(default=2**31, ge=1)
    max_table_bytes: int = Field(default=2**30, ge=1)
    max_json_bytes: int = Field(default=256 * 2**20, ge=1)
    max_samples: int = Field(default=20_000_000, ge=1)
    max_refused_fraction: float = Field(default=0.05, ge=0, le=1)

    @field_validator("classes")
    @classmethod
    def _names_are_names(cls, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if classes is not None:
            if not 0 < len(set(classes)) == len(classes) <= MAX_CLASSES:
                raise ConfigError(f"classes: 1 to {MAX_CLASSES:,} different names")
            if not all(0 < len(name) <= MAX_CLASS_NAME and name.isprintable() for name in classes):
                raise ConfigError(f"classes: names of 1 to {MAX_CLASS_NAME:,} printable characters")
        return classes
