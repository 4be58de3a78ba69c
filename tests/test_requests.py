"""Requests to an object store for the shards of a run: their number does not depend on the groups of shards."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sanitize import remote
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig
from sanitize.errors import DataError
from sanitize.jobs.run import Run
from sanitize.jobs.steps import index_found
from sanitize.storage import create, fingerprint, fingerprints, join
from tests.faulty_proxy import FaultyProxy
from tests.s3 import s3_bucket

N_SHARDS = 4


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> Iterator[tuple[str, FaultyProxy]]:
    """A bucket with the shards of the fixture `dataset`, and the proxy that counts requests."""
    with s3_bucket(monkeypatch, rate=0.0) as (url, proxy):
        for shard in digits.shards()[:N_SHARDS]:
            with create(join(url, "in", Path(shard).name)) as writer:
                writer.write(Path(shard).read_bytes())
        proxy.requests.clear()
        yield url, proxy


@pytest.mark.parametrize("kind", ["folder", "braces"])
def test_requests_for_shards_do_not_grow_with_the_groups(
    kind: str, bucket: tuple[str, FaultyProxy], dataset: Dataset, tmp_path: Path, compute: Compute
) -> None:
    url, proxy = bucket
    names = dataset.shards
    sources = [f"{url}/in"] if kind == "folder" else [f"{url}/in/{{{','.join(names)}}}"]
    counts = []
    for n_groups in (1, N_SHARDS):
        run = Run(tmp_path / str(n_groups), compute, n_groups)
        assert index_found("00-index", sources, IndexConfig(), run).digest == dataset.digest
        counts.append(proxy.requests.copy())
        proxy.requests.clear()
    assert counts[0] == counts[1]
    heads = Counter({path.rpartition("/")[2]: n for (method, path), n in counts[0].items() if method == "HEAD"})
    # One for its fingerprint, one where it is opened; one for the names of the classes of a folder.
    assert heads == dict.fromkeys(names, 2) | {"classes.json": 1}


def test_fingerprints_are_taken_side_by_side_and_an_absent_file_is_named(bucket: tuple[str, FaultyProxy]) -> None:
    url, proxy = bucket
    urls = [join(url, "in", name.rpartition("/")[2]) for name in _listed(url)] * 10
    fingerprint(urls[0])  # connects
    proxy.requests.clear()
    proxy.delay, proxy.most_at_once = 0.05, 0
    found = fingerprints(urls)
    assert 2 <= proxy.most_at_once <= remote.PARALLEL
    assert proxy.requests.total() == len(urls)
    assert found == [fingerprint(place) for place in urls[:N_SHARDS]] * 10
    with pytest.raises(DataError, match=r"cannot read s3://.*/in/absent\.tar"):
        fingerprints([*urls[:2], join(url, "in/absent.tar")])


def _listed(url: str) -> list[str]:
    return remote.expand(join(url, "in"), (".tar",))


def test_local_and_remote_files_may_be_mixed(bucket: tuple[str, FaultyProxy], tmp_path: Path) -> None:
    url, _ = bucket
    file = tmp_path / "x.tar"
    file.write_bytes(b"12345")
    places = [_listed(url)[0], str(file)]
    assert fingerprints(places) == [fingerprint(place) for place in places]
    assert fingerprints([]) == []
