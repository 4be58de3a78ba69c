"""The page about a condensed set: how noise became images, the loss on the way, and what the images are worth."""

from typing import Any

from markupsafe import Markup

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.condense import CondensedSet
from sanitize.data.decode import ImageConfig, decode, encode_png
from sanitize.report import charts
from sanitize.report.page import Report, template, versions
from sanitize.report.pictures import Thumbnail, shrink
from sanitize.stage import Work, stage

_SIDE = 480  # pixels: ten images of 46 pixels, or larger ones made smaller


@stage(Report, gpu=False, draws="nothing")
def write_condensation_report(condensed: CondensedSet, out: str, compute: Compute) -> Work:
    """Write the page.

    Args:
        condensed: the set.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused but for the convention; nothing is random.
    """

    def write(part: Part) -> None:
        info, history = condensed.info, condensed.read_json("history.json")
        numbers = {
            "headline": _headline(info),
            "history": history,
            "info": info,
            "digest": condensed.digest,
            "versions": versions([]),
        }
        part.write_json("report.json", numbers)
        pictures = {iteration: _picture(png) for iteration, png in condensed.frames.items()}
        drawings = [Markup(drawing) for drawing in _drawings(history)]
        page = template("condensation.html.j2").render(numbers, pictures=pictures, drawings=drawings)
        part.write("index.html", page.encode())

    return Work(write=write)


def _headline(info: dict[str, Any]) -> str:
    n, n_real = sum(info["labels"].values()), sum(info["real_images"].values())
    stand = f"{n:,} images stand for {n_real:,}"
    if info["utility"] is None:
        return f"{stand}; what networks learn from them was not measured."
    accuracies = info["utility"]["test_accuracy"]
    return f"{stand}: networks that saw no others are right on {sum(accuracies) / len(accuracies):.1%} of test samples."


def _drawings(history: list[dict[str, float]]) -> list[str]:
    """The loss, and its last three quarters alone: it falls from so high that they lie on the axis."""
    late = history[len(history) // 4 :]
    parts = [history, late] if len(late) < len(history) else [history]
    return [
        charts.curves([row["iteration"] for row in of], {"loss": [row["loss"] for row in of]}, "iteration")
        for of in parts
    ]


def _picture(png: bytes) -> Thumbnail:
    image_CHW = shrink(decode(png, ImageConfig()), _SIDE)
    return encode_png(image_CHW), image_CHW.shape[2], image_CHW.shape[1]
