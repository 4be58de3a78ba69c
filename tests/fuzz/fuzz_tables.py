"""Fuzz what is read beside shards: tables of labels, labels in JSON, and the sources of `sanitize import`.

    python -m tests.fuzz.fuzz_tables --seconds 300 --seed 0

Case n of a seed is always the same file. Whatever is in it: a result or one of our errors, bounded time and memory, and
of an import offered = imported + refused. Exit code 1 where one of these does not hold; the file is kept and named.
"""

import argparse
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sanitize.compute import Compute
from sanitize.data.labels import BadLabel, LabelReader, label_fields
from sanitize.data.samples import Sample
from sanitize.errors import SanitizeError
from sanitize.importing import ImportConfig, import_data
from tests.fuzz.fuzz_shards import IMAGES, IN_MEMORY, MOST_BYTES, MOST_SECONDS, Rng, _damaged, at_most, peak_bytes
from tests.fuzz.loop import Case, cases_until

KEYS = ("k0", "k1", "d/k2", "../k", "k\n", "", "caf\u00e9", "n" * 300, "k0")
LABELS = ("0", "1", "7", "-1", "cat", "", "1.0", "9" * 30, "[0, 1]", "\x1b[2J", "1_0")
COMPRESSIONS = ("none", "snappy", "zstd", "gzip")


def _texts(rng: Rng, choices: tuple[str, ...], n: int) -> list[str]:
    return [choices[i] for i in rng.integers(len(choices), size=n)]


def _csv(rng: Rng, columns: dict[str, list[str]]) -> bytes:
    quote = (lambda text: f'"{text}"') if rng.random() < 0.3 else str
    separator = ",;\t"[rng.integers(3)] if rng.random() < 0.3 else ","
    end = "\r\n" if rng.random() < 0.3 else "\n"
    lines = [list(columns), *zip(*columns.values(), strict=True)]
    data = end.join(separator.join(map(quote, line)) for line in lines).encode()
    return (b"\xef\xbb\xbf" if rng.random() < 0.1 else b"") + data


def _parquet(rng: Rng, table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(
        table,
        file,
        row_group_size=int(rng.integers(1, 9)),
        compression=COMPRESSIONS[rng.integers(4)],
        use_dictionary=bool(rng.random() < 0.5),
        data_page_version="2.0" if rng.random() < 0.3 else "1.0",
    )
    return file.getvalue()


def _pictures(rng: Rng, n: int) -> list[bytes]:
    return [
        _damaged(rng, one) if rng.random() < 0.1 else one for one in (IMAGES[i][1] for i in rng.integers(5, size=n))
    ]


def _rows(rng: Rng) -> pa.Table:
    """Rows of images as `datasets` saves them, or as plain bytes."""
    n = int(rng.integers(1, 20))
    pictures, numbers = _pictures(rng, n), rng.integers(-1, 4, size=n)
    plain = rng.random() < 0.3
    images = (
        pa.array(pictures)
        if plain
        else pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)])
    )
    labels = pa.array(numbers) if rng.random() < 0.6 else pa.array(_texts(rng, LABELS, n))
    table = pa.table({"image": images, "label": labels})
    features = {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    info = json.dumps({"info": {"features": features}}) if rng.random() < 0.8 else "{"
    return table.replace_schema_metadata({"huggingface": info}) if rng.random() < 0.5 else table


def _label_csv(rng: Rng) -> bytes:
    n = int(rng.integers(0, 9))
    return _csv(rng, {"key": _texts(rng, KEYS, n), "class": _texts(rng, LABELS, n)})


def _label_parquet(rng: Rng) -> bytes:
    n = int(rng.integers(1, 9))
    labels = pa.array(_texts(rng, LABELS, n)) if rng.random() < 0.5 else pa.array(rng.integers(-1, 9, size=n))
    labels = labels.dictionary_encode() if rng.random() < 0.3 else labels
    return _parquet(rng, pa.table({"key": _texts(rng, KEYS, n), "class": labels}))


def _label_json(rng: Rng) -> bytes:
    values = ("1", '"1"', "true", "null", "1e999999", "9" * 5000, "[0, 1]", '{"b": 1}', "NaN", '"\\ud800"', "[" * 9000)
    value = values[rng.integers(len(values))]
    forms = ('{"a": {"b": %s}}', '{"a": {"b": %s}, "a.b": 1}', '{"a": {"b": 0, "b": %s}}', "%s", '{"label": %s}')
    return (forms[rng.integers(len(forms))] % value).encode()


def _coco(rng: Rng) -> bytes:
    n = int(rng.integers(0, 9))
    ids = rng.integers(0, 9, size=(2, n)).tolist()
    names = [("0.png", "1.png", "../x.png", "/etc/passwd", "no.png", "d/../0.png")[i] for i in rng.integers(6, size=n)]
    images = [{"id": one, "file_name": name} for one, name in zip(ids[0], names, strict=True)]
    notes = [{"image_id": one, "caption": text} for one, text in zip(ids[1], _texts(rng, LABELS, n), strict=True)]
    sections = {"info": {}, "images": images, "annotations": notes}
    return json.dumps({name: sections[name] for name in rng.permutation(list(sections)).tolist()}).encode()


def _paths(rng: Rng) -> bytes:
    n = int(rng.integers(0, 9))
    paths = ("0.png", "1.png", "2.png", "../x.png", "/etc/passwd", "no.png", "d/../0.png", "C:\\x.png", "")
    return _csv(rng, {"path": _texts(rng, paths, n), "label": _texts(rng, LABELS, n)})


def _arrow(rng: Rng) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd") if rng.random() < 0.1 else None
    table = _rows(rng)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=int(rng.integers(1, 9)))
    return sink.getvalue()


def _read_labels(path: Path, out: Path) -> None:
    reader = LabelReader(f"table:{path}#class")
    for key in KEYS:
        with suppress(BadLabel):
            assert 0 <= int(reader.read(Sample(0, key, [], None))) < reader.n_classes


def _read_json(path: Path, out: Path) -> None:
    data = path.read_bytes()
    label_fields(data)
    for field in ("a.b", "label"):
        with suppress(BadLabel):
            assert 0 <= int(LabelReader(f"json:{field}").read(Sample(0, "k", [("k.json", data)], None))) < 1000


def _import(path: Path, out: Path) -> None:
    config = ImportConfig(max_refused_fraction=1, samples_per_shard=5)
    made = import_data(config, str(path), str(out / "shards"), Compute(device="cpu", threads=1)).summary()
    assert made["offered"] == made["imported"] + made["refused"]


TARGETS: dict[str, tuple[str, Callable[[Rng], bytes], Callable[[Path, Path], None]]] = {
    "labels.csv": ("labels.csv", _label_csv, _read_labels),
    "labels.parquet": ("labels.parquet", _label_parquet, _read_labels),
    "label.json": ("label.json", _label_json, _read_json),
    "import csv": ("rows.csv", _paths, _import),
    "import coco": ("captions.json", _coco, _import),
    "import parquet": ("rows.parquet", lambda rng: _parquet(rng, _rows(rng)), _import),
    "import arrow": ("rows.arrow", _arrow, _import),
}


def run_one(target: str, data: bytes, most_bytes: int, seconds: float = MOST_SECONDS) -> str:
    """Read one file, within the limits; "read" or "refused"."""
    name, _, read = TARGETS[target]
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder, at_most(seconds):
        for i in range(3):
            (Path(folder) / f"{i}.png").write_bytes(IMAGES[0][1])
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            read(path, Path(folder) / "out")
            outcome = "read"
        except SanitizeError:
            outcome = "refused"
    assert peak_bytes() < most_bytes, f"memory rose to {peak_bytes() / 2**20:.0f} MiB"
    return outcome


def make_case(seed: int, n: int) -> tuple[str, bytes]:
    """Target and bytes of case `n`."""
    rng = np.random.default_rng((seed, n))
    target = list(TARGETS)[n % len(TARGETS)]
    data = TARGETS[target][1](rng)
    return target, _damaged(rng, data) if rng.random() < 0.7 else data


def fuzz(seconds: float, seed: int, keep: Path) -> int:
    """Cases until the time is up; the exit code."""
    for target, (_, write, _) in TARGETS.items():  # imports take their time, once
        run_one(target, write(np.random.default_rng(0)), 2**62, 600)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:

        def case(n: int) -> Case:
            target, data = make_case(seed, n)
            path = Path(folder) / TARGETS[target][0]
            path.write_bytes(data)
            return path, lambda most_bytes: f"{target} {run_one(target, data, most_bytes)}"

        outcomes, summary = cases_until(seconds, seed, keep, 4 * len(TARGETS), case, peak_bytes, MOST_BYTES)
    counts = [f"{t} {outcomes[f'{t} read']} read, {outcomes[f'{t} refused']} refused" for t in TARGETS]
    if outcomes:
        print(f"{summary}: {'; '.join(counts)}; nothing failed")
    return 0 if outcomes else 1


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="where a file that fails is kept")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return fuzz(options.seconds, options.seed, options.keep)


if __name__ == "__main__":
    sys.exit(main())
