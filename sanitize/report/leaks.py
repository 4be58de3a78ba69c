"""The page about training samples whose picture is also in the test shards."""

from typing import Any

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.class_names import class_name
from sanitize.data.dataset import Dataset
from sanitize.data.tables import Hygiene
from sanitize.plural import counted
from sanitize.report.page import Report, write_page
from sanitize.report.pictures import Thumbnail, pictures
from sanitize.stage import Work, stage

N_LISTED, N_SHOWN = 1_000, 48  # pairs in the table, and with pictures


@stage(Report, gpu=False, draws="nothing", version=1)
def write_leak_report(hygiene: Hygiene, dataset: Dataset, test: Dataset, out: str, compute: Compute) -> Work:
    """Write the page about training samples whose picture is also in the test shards.

    Args:
        hygiene: findings of `check_hygiene` with these test samples.
        dataset, test: training and test samples.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: not used; every stage takes it.
    """

    def write(part: Part) -> None:
        pairs = _pairs(hygiene, dataset)
        n = int(hygiene.read_json("hygiene.json")["counts"]["test_leak"])
        shown = pairs[:N_SHOWN]
        in_test = [{"shard": p["other_shard"], "position": p["other_position"], "status": ""} for p in shown]
        thumbnails = [_pictures(shown, dataset), _pictures(in_test, test)]
        numbers = {
            "headline": f"{counted(n, 'training sample')} of {dataset.n_samples:,} "
            f"{'shows' if n == 1 else 'show'} a picture that is also in the test shards.",
            "n": n,
            "pairs": pairs,
        }
        write_page(part, "leaks", numbers, thumbnails=list(zip(*thumbnails, strict=True)))

    return Work(write=write)


def _pictures(samples: list[dict[str, Any]], dataset: Dataset) -> list[Thumbnail | None]:
    """Thumbnails of samples, from the shards that were indexed."""
    return pictures(samples, dataset, lambda shard, _status: dataset.urls[shard]) if samples else []


def _pairs(hygiene: Hygiene, dataset: Dataset) -> list[dict[str, Any]]:
    """The first leaks in the order of shards, one a sample."""
    found: list[dict[str, Any]] = []
    for shard in hygiene.shards:
        sample_M = dataset.rows(shard, ["sample"])["sample"] if dataset.has_several else None
        last = -1
        for row in hygiene.rows(shard).to_pylist():
            sample = row["position"] if sample_M is None else sample_M[row["position"]].as_py()
            if row["kind"] != "test_leak" or sample == last:
                continue
            last = sample
            names = ("position", "key", "reason", "other_shard", "other_position")
            found.append(
                {name: row[name] for name in names}
                | {"shard": shard, "status": "", "class": class_name(row["label"], dataset.class_names)}
            )
            if len(found) == N_LISTED:
                return found
    return found
