"""The page about a red team: what was caught, what models learned all the same, and whether requirements are met."""

from typing import Any

from markupsafe import Markup

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.decode import ImageConfig, decode
from sanitize.redteam import MEASURES, NONE, Findings, Samples
from sanitize.report import charts
from sanitize.report.page import Report, template, versions
from sanitize.stage import Work, stage

_DETECTION = ("recall", "precision", "false_removals")
_MODELS = ("acc_before", "acc_after", "asr_before", "asr_after", "asr_untouched")


@stage(Report, gpu=False, draws="nothing")
def write_redteam_report(findings: Findings, samples: Samples, out: str, compute: Compute) -> Work:
    """Write the page.

    Args:
        findings: what was measured.
        samples: what it was measured on.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused but for the convention; nothing is random.
    """

    def write(part: Part) -> None:
        info = findings.info
        numbers = {
            "headline": headline(info),
            **info,
            "repeats": len(next(iter(info["cases"][0]["measures"].values()))["repeats"]),
            "samples": samples.manifest().counts,
            "said_of": MEASURES,
            "digest": findings.digest,
            "recipe": findings.manifest().recipe.model_dump(mode="json"),
            "versions": versions([]),
        }
        part.write_json("report.json", numbers)
        drawings = {case["name"]: {m: _drawing(of) for m, of in case["measures"].items()} for case in info["cases"]}
        pictures = {case: (png, *_size(png)) for case, png in findings.pictures().items()}
        shown = {"drawings": drawings, "pictures": pictures, "detection": _DETECTION, "models": _MODELS}
        part.write("index.html", template("redteam.html.j2").render(numbers, **shown).encode())

    return Work(write=write)


def headline(info: dict[str, Any]) -> str:
    """The verdict where something was required; otherwise how much was caught, and what was removed for nothing."""
    if required := info["requirements"]:
        missed = [requirement["text"] for requirement in required if not requirement["met"]]
        if not missed:
            return f"All {len(required)} requirements are met."
        return f"{len(missed)} of {len(required)} requirements missed: {', '.join(missed)}."
    said = []
    for case in info["cases"]:
        measure = "false_removals" if case["name"] == NONE else "recall"
        what = "removed for nothing" if case["name"] == NONE else f"of {case['name']} caught"
        said.append(f"{100 * case['measures'][measure]['mean']:.1f} % {what}")
    return "; ".join([*said[1:], said[0]]) + "."


def _drawing(of: dict[str, Any]) -> Markup:
    return Markup("" if of["mean"] is None else charts.whisker(of["mean"], of["low"], of["high"]))


def _size(png: bytes) -> tuple[int, int]:
    """Width and height."""
    height, width = decode(png, ImageConfig()).shape[1:]
    return width, height
