"""The page about a red team: detection, models before and after cleaning, and requirements."""

from typing import Any

from markupsafe import Markup

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.decode import ImageConfig, decode
from sanitize.plural import counted
from sanitize.redteaming import MEASURES, NONE, Findings, Samples
from sanitize.report import charts
from sanitize.report.page import Report, write_page
from sanitize.stage import Work, stage

_DETECTION = ("recall", "precision", "false_removals")
_MODELS = ("acc_before", "acc_after", "asr_before", "asr_after", "asr_baseline")


@stage(Report, gpu=False, draws="nothing", version=4)
def write_redteam_report(findings: Findings, samples: Samples, out: str, compute: Compute) -> Work:
    """Write the page about a red team.

    Args:
        findings: measurements of all cases.
        samples: the samples that were attacked.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused; every stage takes it.
    """

    def write(part: Part) -> None:
        info = findings.info
        numbers = {
            "headline": headline(info),
            **info,
            "repeats": len(next(iter(info["cases"][0]["measures"].values()))["repeats"]),
            "samples": samples.manifest().counts,
            "descriptions": MEASURES,
            "digest": findings.digest,
            "recipe": findings.manifest().recipe.model_dump(mode="json"),
        }
        drawings = {
            case["name"]: {measure: _drawing(interval) for measure, interval in case["measures"].items()}
            for case in info["cases"]
        }
        pictures = {case: (png, *_size(png)) for case, png in findings.pictures().items()}
        shown = {"drawings": drawings, "pictures": pictures, "detection": _DETECTION, "models": _MODELS}
        write_page(part, "redteam", numbers, **shown)

    return Work(write=write)


def headline(info: dict[str, Any]) -> str:
    """The verdict on the requirements; without any, recall of each attack and false removals of the unpoisoned case."""
    if required := info["requirements"]:
        missed = [requirement["text"] for requirement in required if not requirement["met"]]
        if not missed:
            return "The requirement is met." if len(required) == 1 else f"All {len(required)} requirements are met."
        return f"{len(missed)} of {counted(len(required), 'requirement')} missed: {', '.join(missed)}."
    measures = {case["name"]: case["measures"] for case in info["cases"]}
    recalls = [f"{100 * by['recall']['mean']:.1f} % ({name})" for name, by in measures.items() if name != NONE]
    false_removals = 100 * measures[NONE]["false_removals"]["mean"]
    return f"Recall {', '.join(recalls)}; false removals {false_removals:.1f} % (unpoisoned)."


def _drawing(interval: dict[str, Any]) -> Markup:
    if interval["mean"] is None:
        return Markup("")
    return Markup(charts.whisker(interval["mean"], interval["low"], interval["high"]))


def _size(png: bytes) -> tuple[int, int]:
    """Width and height."""
    height, width = decode(png, ImageConfig()).shape[1:]
    return width, height
