"""Import: images as they usually lie around become shards.

`detect` finds out what a place holds; `folders`, `table`, `coco` and `parquet` list one kind of source each; `stage`
judges every image and writes the shards. No library of a data set is imported, and none of its code runs.
"""

from sanitize.importing.config import ImportConfig
from sanitize.importing.stage import Imported, import_data

__all__ = ["ImportConfig", "Imported", "import_data"]
