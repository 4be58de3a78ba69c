"""Condensation: shards nobody can vouch for in, a few images a class that stand for them out."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flows.run import Run, claimed, save_config
from flows.runner import RunnerConfig, Threads
from flows.train import index_more
from sanitize.compute import Compute
from sanitize.condense import CondenseConfig, condense_dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards
from sanitize.report import write_condensation_report


class CondenseRunConfig(BaseModel):
    """One run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards to condense.
        test_shards: shards that networks trained on the condensed set are measured on; nothing is learned from them.
        index, condense: one section a stage.
        n_groups: groups of shards that are indexed side by side. Results do not depend on it.
        compute: device, precision, seed, threads.
        runner: threads, processes or ray: where groups of shards are worked on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[str, ...] = Field(min_length=1)
    test_shards: tuple[str, ...] = ()
    index: IndexConfig = IndexConfig()
    condense: CondenseConfig = CondenseConfig()
    n_groups: int = Field(default=1, ge=1)
    compute: Compute = Compute()
    runner: RunnerConfig = Threads()

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything that is read."""
        return (*self.shards, *self.test_shards)


def condense(config: CondenseRunConfig, run: Run) -> dict[str, Any]:
    """The order of work: index, condense, report.

    Returns:
        Places, the last row of the history, and what networks that learned from the set reach on the test shards.
    """
    dataset = run.sharded("00-index", index_shards, list(find_shards(config.shards)), config.index, config.shards)
    test = index_more("01-index-test", config.test_shards, {}, config.index, dataset, run)
    condensed = run.stage("70-condensed", condense_dataset, config.condense, dataset, test=test)
    report = run.stage("90-report", write_condensation_report, condensed)
    utility = condensed.info["utility"]
    result = {
        "condensed": condensed.path,
        "grid": condensed.url("grid.png"),
        "report": report.url("index.html"),
        "last": condensed.read_json("history.json")[-1],
        "test_accuracy": utility and utility["test_accuracy"],
    }
    save_config(config, run.out)
    run.save("finished", **result)
    return result


def run_condense(config: CondenseRunConfig, out: str | Path, direct: bool) -> dict[str, Any]:
    """Condense as a Prefect flow, or with plain function calls; both give the same digests.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process is at work on `out`.
    """
    if direct:
        with claimed(out, config.sources):
            return condense(config, Run(out, config.compute, config.n_groups))
    from flows.tasks import condense_flow  # imports Prefect: a second that --direct need not wait for

    return dict(condense_flow(config, str(out)))
