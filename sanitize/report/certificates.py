"""The page about what is proved of a model: each statement, and its curve of certified accuracy."""

from typing import Any

from markupsafe import Markup

from sanitize.artifacts import Part
from sanitize.certify.certificates import excerpt
from sanitize.compute import Compute
from sanitize.package import ModelPackage
from sanitize.report import charts
from sanitize.report.page import Report, template, versions
from sanitize.stage import Work, stage


@stage(Report, gpu=False, draws="nothing")
def write_certificate_report(package: ModelPackage, out: str, compute: Compute) -> Work:
    """Write the page.

    Args:
        package: a model with certificates, or without.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused but for the convention; nothing is random.
    """

    def write(part: Part) -> None:
        certificates = package.read_json("certificate.json")["certificates"]
        numbers = {
            "headline": "; ".join(map(_headline, certificates)) or "Nothing is proved about this model.",
            "certificates": certificates,
            "model": package.config.model_dump(mode="json"),
            "digest": package.digest,
            "versions": versions([]),
        }
        drawings = [Markup(_drawing(of)) for of in certificates]
        part.write_json("report.json", numbers)
        shown = {"drawings": drawings, "excerpts": [excerpt(of["certified_accuracy"]) for of in certificates]}
        part.write("index.html", template("certificates.html.j2").render(numbers, **shown).encode())

    return Work(write=write)


def _headline(of: dict[str, Any]) -> str:
    radius, share = of["certified_accuracy"][len(of["certified_accuracy"]) // 2]
    right = f"{share:.1%} of {of['samples']} test samples are right"
    if of["integral"]:
        return f"{right}, whatever {radius:g} {of['radius_unit']} somebody inserts or removes"
    return f"{right}, and all that is closer than {radius:g} ({of['radius_unit']})"


def _drawing(of: dict[str, Any]) -> str:
    radii, shares = zip(*of["certified_accuracy"], strict=True)
    unit = f"radius: {of['radius_unit']}"
    return charts.curves(radii, {"certified": shares}, unit, share=True, whole=of["integral"])
