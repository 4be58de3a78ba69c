"""The page about one training: its curves, its last numbers, and how it was done."""

from typing import Any

from markupsafe import Markup

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.report import charts
from sanitize.report.page import Report, template, versions
from sanitize.stage import Work, stage
from sanitize.train import RobustModel


@stage(Report, gpu=False, draws="nothing")
def write_training_report(model: RobustModel, out: str, compute: Compute) -> Work:
    """Write the page.

    Args:
        model: what was trained.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused but for the convention; nothing is random.
    """

    def write(part: Part) -> None:
        numbers = _numbers(model)
        part.write_json("report.json", numbers)
        drawings = [Markup(drawing) for drawing in _drawings(numbers["history"])]
        part.write("index.html", template("training.html.j2").render(numbers, drawings=drawings).encode())

    return Work(write=write)


def _numbers(model: RobustModel) -> dict[str, Any]:
    history, recipe = model.history, model.manifest().recipe
    last, method = history[-1], recipe.config["method"]
    measured = (
        f"{last['test_accuracy']:.1%} of the test samples right"
        if "test_accuracy" in last
        else f"{last['accuracy']:.1%} of the given labels learned"
    )
    return {
        "headline": f"{len(history)} epochs, {measured}, {last['dropped']:.0%} of the samples left out at the end.",
        "history": history,
        "columns": list(last),
        "dropped": method["select_batch"]["kind"] != "all",
        "digest": model.digest,
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions([]),
    }


def _drawings(history: list[dict[str, float]]) -> list[str]:
    epochs = [row["epoch"] for row in history]
    series = {name: [row[name] for row in history] for name in history[0] if name != "epoch"}
    losses = {name.replace("_", " "): values for name, values in series.items() if name == "loss"}
    shares = {name.replace("_", " "): values for name, values in series.items() if name != "loss"}
    return [charts.curves(epochs, losses, "epoch"), charts.curves(epochs, shares, "epoch", share=True)]
