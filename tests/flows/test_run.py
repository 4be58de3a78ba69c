"""Dividing shards into groups, and what a run remembers."""

import json
from pathlib import Path

import pytest

from sanitize.compute import Compute
from sanitize.data.digits import write_digits
from sanitize.jobs.run import Run, split


@pytest.mark.parametrize(("n", "sizes"), [(1, [5]), (2, [2, 3]), (3, [1, 2, 2]), (5, [1] * 5), (9, [1] * 5), (0, [5])])
def test_groups_are_about_equal_and_hold_every_shard_once(n: int, sizes: list[int]) -> None:
    shards = [f"{i}.tar" for i in range(5)]
    groups = split(shards, n)
    assert sorted(map(len, groups)) == sizes
    assert [shard for group in groups for shard in group] == shards


def test_run_json_lists_what_was_made_and_what_was_there(tmp_path: Path) -> None:
    def digits(n_shards: int, out: str, compute: Compute):  # type: ignore[no-untyped-def]
        return write_digits(out, compute, n_shards)

    for resumed in (False, True):
        run = Run(tmp_path, Compute(device="cpu"))
        artifact = run.stage("digits", digits, 3)
        (stage,) = json.loads((tmp_path / "run.json").read_text())["stages"]
        assert (stage["stage"], stage["digest"], stage["samples"]) == ("digits", artifact.digest, 1797)
        assert stage["resumed"] is resumed
