"""Pack a folder of images in class folders into WebDataset shards.

python examples/pack_folders.py images data [--per-shard 1000]

Reads images/CLASS/*.jpg (or png, webp, ppm, bmp, gif, tiff, avif) and writes data/train-000000.tar,
data/train-000001.tar, ... A sample has the unchanged image, the class as an integer (.cls) and the path of the file
(.json). data/classes.json maps class names to integers. The order is random but fixed, so that every shard has samples
of all classes.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import webdataset

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".ppm", ".bmp", ".gif", ".tif", ".tiff", ".avif"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", type=Path, help="folder with one folder for each class")
parser.add_argument("shards", type=Path, help="new folder for the shards")
parser.add_argument("--per-shard", type=int, default=1000, help="samples of one shard")
options = parser.parse_args()

classes = sorted(folder.name for folder in options.images.iterdir() if folder.is_dir())
labels = {name: label for label, name in enumerate(classes)}
files = sorted(path for name in classes for path in (options.images / name).rglob("*") if path.is_file())
images = [path for path in files if path.suffix.lower() in SUFFIXES]
if not images:
    sys.exit(f"{options.images}: no images in class folders; expected {options.images}/CLASS/NAME.jpg")
random.Random(0).shuffle(images)

options.shards.mkdir(parents=True)  # an existing folder is an error: its shards would be mixed with the new ones
with webdataset.ShardWriter(str(options.shards / "train-%06d.tar"), maxcount=options.per_shard, verbose=0) as writer:
    for number, path in enumerate(images):
        place = path.relative_to(options.images)
        writer.write(
            {
                "__key__": f"{number:06d}",
                path.suffix.lower().lstrip("."): path.read_bytes(),
                "cls": str(labels[place.parts[0]]).encode(),
                "json": json.dumps({"path": str(place)}).encode(),
            }
        )
(options.shards / "classes.json").write_text(json.dumps(labels, indent=2))
print(f"{len(images):,} images of {len(classes):,} classes; {len(files) - len(images):,} other files left out")
