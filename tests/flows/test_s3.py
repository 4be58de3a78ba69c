"""The clean flow on an object store that fails now and then: the digests are those of the local disk."""

from pathlib import Path
from typing import Any

import pytest

from flows.start import start
from sanitize.artifacts import read_manifest
from sanitize.data.tables import Selection
from sanitize.jobs.clean import CleanConfig
from sanitize.jobs.restore import restore, verify_run, write_again
from sanitize.storage import create, join, names_below, read_bytes
from tests.faulty_proxy import FAULTS
from tests.flows.test_clean import FOLDERS
from tests.s3 import s3_bucket


@pytest.mark.slow
@pytest.mark.prefect
def test_a_flow_from_s3_to_s3_gives_the_digests_of_local_disk(
    direct: Path, settings: dict[str, Any], poisoned: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_bucket(monkeypatch, rate=0.1) as (bucket, proxy):
        for shard in sorted(poisoned.glob("*.tar")):
            with create(join(bucket, "in", shard.name)) as writer:
                writer.write(shard.read_bytes())
        out = join(bucket, "runs/first")
        config = CleanConfig.model_validate(settings | {"shards": [join(bucket, "in")], "n_groups": 2})
        result = start(config, out, direct=False)
        assert all(proxy.injected[fault] >= 5 for fault in FAULTS), proxy.injected
        assert {name: read_manifest(join(out, name)).digest for name in FOLDERS} == {
            name: read_manifest(direct / name).digest for name in FOLDERS
        }
        clean = [name for name in names_below(direct / "50-shards") if name.startswith("clean/")]
        assert names_below(result["clean"]) == [name.removeprefix("clean/") for name in clean]
        for name in clean:
            assert read_bytes(join(out, "50-shards", name)) == (direct / "50-shards" / name).read_bytes()
        left = names_below(out)
        assert not [name for name in left if ".partial" in name or ".tmp-" in name]
        assert sum(name.startswith(".lock/") for name in left) == 1  # given back: `restore` takes it

        proxy.rate = 0.0
        assert verify_run(out) == (verify_run(str(direct))[0], [])
        quarantined = [row for shard in Selection.load(join(out, "40-selection")).shards for row in rows(out, shard)]
        restored = restore(out=out, keys=quarantined[0]["key"], note="a person looked at it").summary
        assert restored["clean"] == join(out, "50-shards.r1", "clean")
        assert write_again(out) == join(out, "90-report.r1", "index.html")
        assert len(read_bytes(join(out, "decisions.jsonl")).splitlines()) == 1
        assert verify_run(out)[1] == []


def rows(out: str, shard: str) -> list[dict[str, Any]]:
    table = Selection.load(join(out, "40-selection")).rows(shard, ["key", "status"])
    return [row for row in table.to_pylist() if row["status"] == "quarantined"]
