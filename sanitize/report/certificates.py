"""The page about what is proved of a model: each statement, and its curve of certified accuracy."""

from typing import Any

from markupsafe import Markup

from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.package import ModelPackage
from sanitize.report import charts
from sanitize.report.page import Report, template, versions


def write_certificate_report(package: ModelPackage, out: str, compute: Compute) -> Report:
    """Write the page.

    Args:
        package: a model with certificates, or without.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused but for the convention; nothing is random.
    """
    compute.activate()
    recipe = Recipe(stage="write_certificate_report", inputs={"package": package.digest})

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
        part.write("index.html", template("certificates.html.j2").render(numbers, drawings=drawings).encode())

    return make(Report, out, recipe, write)


def _headline(of: dict[str, Any]) -> str:
    radius, share = of["certified_accuracy"][len(of["certified_accuracy"]) // 2]
    unit, up_to = of["radius_unit"], f"{share:.1%} of {of['samples']} samples are right"
    return f"{up_to} whatever {radius:g} {unit} do" if of["integral"] else f"{up_to} within {radius:.3g} ({unit})"


def _drawing(of: dict[str, Any]) -> str:
    radii, shares = zip(*of["certified_accuracy"], strict=True)
    unit = f"radius: {of['radius_unit']}"
    return charts.curves(radii, {"certified accuracy": shares}, unit, share=True, whole=of["integral"])
