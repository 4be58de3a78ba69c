"""Decisions on batches: what a batch is called after one, a decision made twice, names that are not there."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from sanitize.ledger import Ledger, RefusedEntry
from tests.test_ledger import claim, commit, reference, refused, split


@pytest.fixture
def batches(tmp_path: Path) -> dict[str, str]:
    """Status -> name of a batch, in a store at `tmp_path` that also has a refused shard."""
    ledger = Ledger(str(tmp_path))
    ledger.append(lambda _state: reference())
    names = {}
    for content, status in zip("abcd", ("held", "accepted", "failed", "split"), strict=True):
        entry, _ = ledger.append(lambda state, content=content: claim(state, content))
        end = split(entry, refused(content)) if status == "split" else commit(entry, status)
        ledger.append(lambda _state, end=end: end)
        names[status] = entry.batch
    ledger.append(lambda _state: RefusedEntry(shards=(refused("e", "/in/e.tar"),)))
    return names


def call(store: Path, *command: str) -> Result:
    return CliRunner().invoke(app, [*command, "--store", str(store)])


def listed(store: Path, status: str) -> list[str]:
    rows = json.loads(call(store, "batches", "--status", status, "--json").stdout)
    assert all(row["status"] == status for row in rows)
    return [row["batch"] for row in rows]


@pytest.mark.parametrize(
    ("command", "decision", "status"),
    [("reject", "rejected", "held"), ("approve", "approved", "held"), ("reject", "rejected", "accepted"),
     ("reject", "rejected", "failed"), ("retry", "retried", "failed")],
)  # fmt: skip
def test_a_decided_batch_is_listed_by_its_decision_and_no_more_by_its_outcome(
    batches: dict[str, str], tmp_path: Path, command: str, decision: str, status: str
) -> None:
    name = batches[status]
    assert (listed(tmp_path, status), listed(tmp_path, decision)) == ([name], [])
    assert call(tmp_path, command, name, "--by", "Ada").exit_code == 0
    assert (listed(tmp_path, status), listed(tmp_path, decision)) == ([], [name])


@pytest.mark.parametrize(
    ("command", "decision", "what"),
    [("approve", "approved", "held"), ("reject", "rejected", "held"), ("retry", "retried", "failed"),
     ("retry", "retried", "split"), ("retry", "retried", "e.tar")],
)  # fmt: skip
def test_a_decision_made_twice_is_recorded_once_and_the_second_time_names_the_first(
    batches: dict[str, str], tmp_path: Path, command: str, decision: str, what: str
) -> None:
    name = batches.get(what, what)
    first = call(tmp_path, command, name, "--by", "Ada", "--note", "seen")
    assert first.exit_code == 0
    assert f"{decision} by Ada and " in first.output
    n = Ledger(str(tmp_path)).read().n_entries
    again = call(tmp_path, command, name, "--by", "Bob")
    assert again.exit_code == 0
    assert f"was {decision} already by Ada at 20" in again.output
    assert ": seen" in again.output
    assert Ledger(str(tmp_path)).read().n_entries == n
    assert json.loads(call(tmp_path, command, name, "--json").stdout)["already"] is True


@pytest.mark.parametrize("command", ["approve", "reject"])
def test_a_name_that_is_not_there_is_named_with_the_batches_that_begin_nearly_so(
    batches: dict[str, str], tmp_path: Path, command: str
) -> None:
    near = batches["held"]
    wrong = near[:4] + ("0" if near[4] != "0" else "1")
    found = call(tmp_path, command, wrong)
    assert found.exit_code == 2
    assert found.output.startswith(f"failed: there is no batch '{wrong}': {near}")
    assert all(name in call(tmp_path, command, "none-like-it").output for name in list(batches.values())[1:])


def test_a_shard_that_is_not_refused_is_named_with_those_that_are_called_nearly_so(
    batches: dict[str, str], tmp_path: Path
) -> None:
    found = call(tmp_path, "retry", "ee.tar")
    assert found.exit_code == 2
    assert found.output.startswith("failed: no batch begins with 'ee.tar', and no refused shard is called so; there")
    assert "e.tar" in found.output.rpartition("there are")[2]


def test_a_decision_that_does_not_fit_names_the_status_that_it_fits(batches: dict[str, str], tmp_path: Path) -> None:
    found = call(tmp_path, "retry", batches["accepted"])
    assert found.exit_code == 2
    assert f"batch {batches['accepted']} is accepted; only a failed or claimed batch can be retried" in found.output
