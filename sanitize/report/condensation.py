"""The page about a condensed set: the images during optimisation, the loss, and the accuracy of trained networks."""

from typing import Any

from markupsafe import Markup

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.condensation import CondensedSet
from sanitize.data.class_names import class_name
from sanitize.data.decode import ImageConfig, decode, encode_png
from sanitize.plural import counted
from sanitize.report import charts
from sanitize.report.page import Report, write_page
from sanitize.report.pictures import Thumbnail, shrink
from sanitize.stage import Work, stage

_N_NAMED = 100  # classes named on the page
_SIDE = 480  # pixels: ten images of 46 pixels, or larger ones made smaller


@stage(Report, gpu=False, draws="nothing", version=4)
def write_condensation_report(condensed: CondensedSet, out: str, compute: Compute) -> Work:
    """Write the page about a condensed set.

    Args:
        condensed: the condensed set.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused; every stage takes it.
    """

    def write(part: Part) -> None:
        info, history = condensed.info, condensed.read_json("history.json")
        numbers = {
            "headline": _headline(info),
            "history": history,
            "info": info,
            "digest": condensed.digest,
        }
        pictures = {iteration: _picture(png) for iteration, png in condensed.frames.items()}
        drawings = [Markup(drawing) for drawing in _drawings(history)]
        write_page(part, "condensation", numbers, pictures=pictures, drawings=drawings, rows=_rows(info))

    return Work(write=write)


def _rows(info: dict[str, Any]) -> list[str]:
    """The first classes, where classes have names."""
    names = {int(label): str(name) for label, name in info.get("class_names", {}).items()}
    return [class_name(label, names) for label in range(min(info["n_classes"], _N_NAMED))] if names else []


def _headline(info: dict[str, Any]) -> str:
    n, n_real = sum(info["labels"].values()), sum(info["real_images"].values())
    condensed = f"{counted(n_real, 'image')} condensed to {n:,}"
    if info["utility"] is None:
        return f"{condensed}; the accuracy of networks trained on them was not measured."
    accuracies = info["utility"]["test_accuracy"]
    mean = sum(accuracies) / len(accuracies)
    return f"{condensed}; networks trained on these alone have a mean test accuracy of {mean:.1%}."


def _drawings(history: list[dict[str, float]]) -> list[str]:
    """The loss, and its last three quarters on a scale of their own: the first quarter is much higher."""
    late = history[len(history) // 4 :]
    parts = [history, late] if len(late) < len(history) else [history]
    return [
        charts.curves([row["iteration"] for row in part], {"loss": [row["loss"] for row in part]}, "iteration")
        for part in parts
    ]


def _picture(png: bytes) -> Thumbnail:
    image_CHW = shrink(decode(png, ImageConfig()), _SIDE)
    return encode_png(image_CHW), image_CHW.shape[2], image_CHW.shape[1]
