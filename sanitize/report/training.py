"""The page about a training: curves, a table of the epochs, and the recipe."""

from typing import Any

from markupsafe import Markup

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.plural import counted
from sanitize.report import charts
from sanitize.report.page import Report, write_page
from sanitize.stage import Work, stage
from sanitize.training import RobustModel


@stage(Report, gpu=False, draws="nothing", version=3)
def write_training_report(model: RobustModel, out: str, compute: Compute) -> Work:
    """Write the page about robust training.

    Args:
        model: the trained model.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused; every stage takes it.
    """

    def write(part: Part) -> None:
        numbers = _numbers(model)
        drawings = [Markup(drawing) for drawing in _drawings(numbers["history"])]
        write_page(part, "training", numbers, drawings=drawings)

    return Work(write=write)


def _numbers(model: RobustModel) -> dict[str, Any]:
    history, recipe = model.history, model.manifest().recipe
    last, method = history[-1], recipe.config["method"]
    measured = (
        f"test accuracy {last['test_accuracy']:.1%}"
        if "test_accuracy" in last
        else f"accuracy {last['accuracy']:.1%} on the given labels"
    )
    return {
        "headline": (
            f"{counted(len(history), 'epoch')}; {measured}; {last['dropped']:.0%} of the samples dropped at the end."
        ),
        "history": history,
        "columns": list(last),
        "dropped": method["select_batch"]["kind"] != "all",
        "digest": model.digest,
        "recipe": recipe.model_dump(mode="json"),
    }


def _drawings(history: list[dict[str, float]]) -> list[str]:
    epochs = [row["epoch"] for row in history]
    series = {name: [row[name] for row in history] for name in history[0] if name != "epoch"}
    losses = {name.replace("_", " "): values for name, values in series.items() if name == "loss"}
    shares = {name.replace("_", " "): values for name, values in series.items() if name != "loss"}
    return [charts.curves(epochs, losses, "epoch"), charts.curves(epochs, shares, "epoch", share=True)]
