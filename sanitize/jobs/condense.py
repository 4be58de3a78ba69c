"""Condensation: untrusted shards in, a few learned images a class out."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sanitize.condensation import CondenseConfig, CondensedSet, condense_dataset
from sanitize.jobs.job import RunConfig, job
from sanitize.jobs.result import JobRun
from sanitize.jobs.run import Run
from sanitize.jobs.steps import index_found, index_more, leaks, with_facts
from sanitize.report import write_condensation_report


class CondenseRunConfig(RunConfig):
    """Config of one run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards to condense.
        test_shards: shards to measure networks on that learned from the condensed set; nothing is learned from them.
        condense: section of the stage.
    """

    test_shards: tuple[str, ...] = ()
    condense: CondenseConfig = CondenseConfig()

    @property
    def sources(self) -> tuple[str, ...]:
        """All shards that the job reads."""
        return (*self.shards, *self.test_shards)


@dataclass(frozen=True)
class CondenseRun(JobRun):
    """A finished run of `condense`."""

    kind = CondenseRunConfig

    @property
    def grid(self) -> str:
        """Path or URL of a picture: up to ten images a class, one class a row."""
        return self._in("70-condensed", "grid.png")

    @property
    def history(self) -> list[dict[str, Any]]:
        """The loss, one row a measured iteration."""
        rows: list[dict[str, Any]] = self._condensed().read_json("history.json")
        return rows

    @property
    def test_accuracy(self) -> Any:
        """Accuracy on the test shards of networks that learned from the condensed set; None without test shards."""
        utility = self._condensed().info["utility"]
        return utility and utility["test_accuracy"]

    @property
    def report(self) -> str:
        """Path or URL of the report page."""
        return self._page()

    def load(self) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), float32 in normalised units, and labels (N,), int64."""
        return self._condensed().tensors()

    def _condensed(self) -> CondensedSet:
        return CondensedSet.load(self._in("70-condensed"))


@job(CondenseRunConfig, CondenseRun)
def condense(config: CondenseRunConfig, run: Run) -> dict[str, Any]:
    """Learn a few images a class that stand for a data set.

    Stages: index, condense (with the accuracy of networks that learn from the set), report.

    Returns:
        Places, the last row of the history, and the accuracy on the test shards.
    """
    index = with_facts(config.index, bool(config.test_shards))
    dataset = index_found("00-index", config.shards, index, run)
    test = index_more("01-index-test", config.test_shards, {}, index, dataset, run)
    n_leaks = leaks(dataset, test, run)
    condensed = run.stage("70-condensed", condense_dataset, config.condense, dataset, test=test)
    report = run.stage("90-report", write_condensation_report, condensed)
    utility = condensed.info["utility"]
    result = {
        "condensed": condensed.path,
        "grid": condensed.url("grid.png"),
        "report": report.url("index.html"),
        "last": condensed.read_json("history.json")[-1],
        "test_leaks": n_leaks,
        "test_accuracy": utility and utility["test_accuracy"],
    }
    return run.finish(config, result)
