"""Statistics of seen samples: counts, moments, and a sample of each class. All of them merge.

The sample of a class is bottom-k: the rows whose keyed hash of (sha256 of the shard, position) is smallest (Cohen &
Kaplan, "Summarizing data using bottom-k sketches", PODC 2007). The choice depends on the content of the shards alone,
so the sample of a union is the sample of the samples, bit for bit. Counts are exact too, moments up to rounding.

The lowest bit of the hash divides the sample in two halves: `fit`, on which scorers are fitted, and `calibrate`, kept
samples only, which thresholds are computed from. Memory: the rows of the sample.
Shapes: N rows of a shard, r components.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch

from sanitize.artifacts import Part, first_line
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.tables import Embeddings, Selection, write_rows
from sanitize.drift.config import StatisticsConfig
from sanitize.drift.projection import Projection, verdicts_of, with_verdicts
from sanitize.errors import ArtifactError, ConfigError
from sanitize.progress import track
from sanitize.stage import Work, stage
from sanitize.streaming import ClassMoments

FIT, CALIBRATE = "fit", "calibrate"  # the two halves, as shards of the artifact


class Statistics(Embeddings):
    """Two shards of embeddings, `fit` and `calibrate` (with the columns `hash`, `kept`, and the origin of a row:
    `shard`, a sha256, and `source_position`); `moments.safetensors`; `statistics.json`."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """statistics.json: `classes`: label -> n (readable) and removed; `unreadable`; and the settings."""
        return self.read_object("statistics.json", "classes", "n_components", "unreadable")

    @cached_property
    def moments(self) -> ClassMoments:
        """Moments of the kept samples of each class, in the coordinates of the projection."""
        state, n = self.read_tensors("moments.safetensors"), self.info["n_components"]
        try:
            found = ClassMoments.from_state_dict(n, state)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ArtifactError(f"{self.path} does not hold moments of classes: {first_line(error)}") from error
        shapes = {(one.mean_D.shape, one.scatter_DD.shape) for one in found.by_class.values()}
        if shapes - {((n,), (n, n))} or not all(tensor.isfinite().all() for tensor in state.values()):
            raise ArtifactError(f"{self.path} does not hold finite moments of {n} components")
        return found

    @property
    def counts(self) -> dict[int, dict[str, int]]:
        """Label -> `n` readable samples, and the number `removed` of them."""
        return {int(label): counts for label, counts in self.info["classes"].items()}


@stage(Statistics, version=2, gpu=False)
def summarise_shards(
    config: StatisticsConfig,
    dataset: Dataset,
    embeddings: Embeddings,
    selection: Selection,
    projection: Projection,
    out: str,
    compute: Compute,
) -> Work:
    """Compute the statistics of these shards.

    Args:
        config: size of the sample.
        dataset: the shards; their sha256 name the rows, so the index must have them.
        embeddings: embeddings of the readable samples, with all that scorers read.
        selection: verdicts on the samples.
        projection: coordinates of the moments.
        out: folder of the artifact.
        compute: seed of the sample. An attacker who fills shards cannot predict it, so cannot choose the sampled rows.

    Raises:
        ConfigError: the shards were indexed without digests.
    """
    if any(shard["sha256"] is None for shard in dataset.info["shards"].values()):
        raise ConfigError("statistics need the sha256 of each shard: set index.check to digest or decode")
    seed, k = compute.seed_for("drift", "sample"), config.rows_of_class(dataset.n_classes)

    def write(part: Part) -> None:
        moments, chosen = ClassMoments(projection.n_components), {half: _no_keys() for half in (FIT, CALIBRATE)}
        with track("summarise", dataset.n_samples) as advance:
            for shard in embeddings.shards:
                for batch, kept_B in with_verdicts(embeddings, selection, config.embedding, shard):
                    moments.update(projection(batch.z_BD[kept_B]), batch.labels_B[kept_B])
                    advance(len(batch.keys))
                keys = _keys(dataset, embeddings, selection, shard, seed)
                chosen = {half: bottom_k(pa.concat_tables([chosen[half], half_of(keys, half)]), k) for half in chosen}
        for half, keys in chosen.items():
            _write_half(part, half, pa.concat_tables(_rows(embeddings, keys)), k)
        part.write("moments.safetensors", safetensors.torch.save(moments.state_dict()))
        settings = {"seed": seed, "rows_of_class": k, "projection": projection.digest, "embedding": config.embedding}
        numbers = {"n_components": projection.n_components, "n_classes": dataset.n_classes}
        part.write_json("statistics.json", settings | numbers | _counts(dataset, selection))
        part.counts["samples"] = selection.manifest().counts["samples"]

    return Work(write=write)


@stage(Statistics, gpu=False)
def merge_statistics(config: StatisticsConfig, parts: Sequence[Statistics], out: str, compute: Compute) -> Work:
    """Merge the statistics of several sets of shards; only the statistics are read.

    Args:
        config: config of the parts.
        parts: statistics to merge; no shard may be in two of them.
        out: folder of the artifact.
        compute: compute settings of the parts.

    Raises:
        ArtifactError: the parts were made with different settings.
    """
    same = ("seed", "rows_of_class", "projection", "embedding", "n_components", "n_classes")
    info = {name: parts[0].info[name] for name in same}
    for other in parts:
        if different := [name for name in same if other.info[name] != info[name]]:
            raise ArtifactError(f"{other.path} cannot be merged with {parts[0].path}: different {', '.join(different)}")

    def write(part: Part) -> None:
        for half in (FIT, CALIBRATE):
            rows = None
            for other in parts:
                more = other.rows(half)
                rows = more if rows is None else bottom_k(pa.concat_tables([rows, more]), info["rows_of_class"])
            _write_half(part, half, rows, info["rows_of_class"])
        moments = ClassMoments(info["n_components"])
        counts: dict[str, Counter[str]] = {}
        for other in parts:
            moments.merge(other.moments)
            for label, entry in other.info["classes"].items():
                counts.setdefault(label, Counter()).update(entry)
        classes = {label: {"n": c["n"], "removed": c["removed"]} for label, c in counts.items()}
        part.write("moments.safetensors", safetensors.torch.save(moments.state_dict()))
        unreadable = sum(other.info["unreadable"] for other in parts)
        part.write_json("statistics.json", info | {"classes": classes, "unreadable": unreadable})
        part.counts["samples"] = sum(other.manifest().counts["samples"] for other in parts)

    return Work(write=write, inputs={f"{i:04d}": part.digest for i, part in enumerate(parts)})


def bottom_k(rows: pa.Table, k: int) -> pa.Table:
    """The k rows of each label with the smallest hashes, by label and hash; rows with the same hash count once."""
    labels_N, hashes_N = rows["label"].to_numpy(), rows["hash"].to_numpy()
    order_N = np.lexsort((hashes_N, labels_N))
    labels_N, hashes_N = labels_N[order_N], hashes_N[order_N]
    is_new_N = np.ones(len(order_N), bool)
    is_new_N[1:] = (labels_N[1:] != labels_N[:-1]) | (hashes_N[1:] != hashes_N[:-1])
    order_n, labels_n = order_N[is_new_N], labels_N[is_new_N]
    rank_n = np.arange(len(labels_n)) - np.searchsorted(labels_n, labels_n)
    return rows.take(pa.array(order_n[rank_n < k]))


def half_of(keys: pa.Table, half: str) -> pa.Table:
    """Rows of a half: by the lowest bit of the hash, and only kept rows for calibration."""
    is_odd_N = (keys["hash"].to_numpy() & np.uint64(1)).astype(bool)
    return keys.filter(pa.array(is_odd_N & keys["kept"].to_numpy() if half == CALIBRATE else ~is_odd_N))


def _no_keys() -> pa.Table:
    schema = {"hash": pa.uint64(), "label": pa.int64(), "source_position": pa.int64(), "kept": pa.bool_()}
    return pa.schema({**schema, "name": pa.string(), "shard": pa.string()}).empty_table()


def _keys(dataset: Dataset, embeddings: Embeddings, selection: Selection, shard: str, seed: int) -> pa.Table:
    """Rows of a shard without their embeddings."""
    sha256 = dataset.info["shards"][shard]["sha256"]
    rows = embeddings.rows(shard, ["position", "label"])
    positions_N, kept_N = verdicts_of(selection, shard)
    if not np.array_equal(positions_N, rows["position"].to_numpy()):
        raise ArtifactError(f"{selection.path} does not judge the samples of {embeddings.path}, shard {shard}")
    hashes = [
        int.from_bytes(hashlib.blake2b(f"{seed}/{sha256}/{position}".encode(), digest_size=8).digest(), "big")
        for position in positions_N.tolist()
    ]
    columns = {"hash": pa.array(hashes, pa.uint64()), "label": rows["label"], "source_position": rows["position"]}
    return pa.table({**columns, "kept": kept_N, "name": [shard] * len(hashes), "shard": [sha256] * len(hashes)})


def _rows(embeddings: Embeddings, keys: pa.Table) -> Iterator[pa.Table]:
    """The chosen rows with all their embeddings and logits, shard by shard; first an empty table with the columns."""
    columns = ["position", "key", *embeddings.columns]
    yield _joined(_no_keys(), embeddings.rows(embeddings.shards[0], columns).slice(0, 0))
    names_N = keys["name"].to_numpy(zero_copy_only=False)
    for shard in sorted(set(names_N.tolist())):
        chosen = keys.filter(pa.array(names_N == shard))
        rows = embeddings.rows(shard, columns)
        at = np.searchsorted(rows["position"].to_numpy(), chosen["source_position"].to_numpy())
        yield _joined(chosen, rows.take(pa.array(at)))


def _joined(keys: pa.Table, rows: pa.Table) -> pa.Table:
    for name in rows.column_names:
        if name != "position":
            keys = keys.append_column(name, rows[name])
    return keys.drop_columns(["name"])


def _write_half(part: Part, half: str, rows: pa.Table, k: int) -> None:
    """Write rows by label and hash; `position` is the place in this order, by which scorers tell rows apart."""
    rows = bottom_k(rows, k).combine_chunks()
    if "position" in rows.column_names:
        rows = rows.drop_columns(["position"])
    write_rows(part, half, rows.append_column("position", pa.array(np.arange(len(rows)))))


def _counts(dataset: Dataset, selection: Selection) -> dict[str, Any]:
    n: Counter[int] = Counter()
    removed: Counter[int] = Counter()
    for shard in dataset.shards:
        verdicts = selection.rows(shard, ["label", "status"]).to_pydict()
        pairs = list(zip(verdicts["label"], verdicts["status"], strict=True))
        n.update(label for label, status in pairs if status != "unreadable")
        removed.update(label for label, status in pairs if status == "quarantined")
    classes = {str(label): {"n": n[label], "removed": removed[label]} for label in sorted(n)}
    return {"classes": classes, "unreadable": selection.manifest().counts.get("unreadable", 0)}
