"""Condensation: shards nobody can vouch for in, a few images a class that stand for them out."""

from typing import Any

from sanitize.condense import CondenseConfig, condense_dataset
from sanitize.jobs.job import RunConfig, job
from sanitize.jobs.run import Run
from sanitize.jobs.steps import index_found, index_more
from sanitize.report import write_condensation_report


class CondenseRunConfig(RunConfig):
    """One run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards to condense.
        test_shards: shards that networks trained on the condensed set are measured on; nothing is learned from them.
        index, condense: one section a stage.
    """

    test_shards: tuple[str, ...] = ()
    condense: CondenseConfig = CondenseConfig()

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything that is read."""
        return (*self.shards, *self.test_shards)


@job(CondenseRunConfig)
def condense(config: CondenseRunConfig, run: Run) -> dict[str, Any]:
    """Condense shards: index, learn a few images a class, measure what networks learn from them.

    Returns:
        Places, the last row of the history, and what networks that learned from the set reach on the test shards.
    """
    dataset = index_found("00-index", config.shards, config.index, run)
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
    return run.finish(config, result)
