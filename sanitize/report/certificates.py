"""The page about the certificates of a model: each statement and its curve of certified accuracy."""

from typing import Any

from markupsafe import Markup

from sanitize.artifacts import Part
from sanitize.certification.certificates import excerpt
from sanitize.compute import Compute
from sanitize.packaging import ModelPackage
from sanitize.plural import counted
from sanitize.report import charts
from sanitize.report.page import Report, write_page
from sanitize.stage import Work, stage


@stage(Report, gpu=False, draws="nothing", version=3)
def write_certificate_report(package: ModelPackage, out: str, compute: Compute) -> Work:
    """Write the page about certificates of a model.

    Args:
        package: a model with or without certificates.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused; every stage takes it.
    """

    def write(part: Part) -> None:
        certificates = package.read_json("certificate.json")["certificates"]
        numbers = {
            "headline": "; ".join(map(_headline, certificates)) or "This model has no certificates.",
            "certificates": certificates,
            "model": package.config.model_dump(mode="json"),
            "digest": package.digest,
        }
        drawings = [Markup(_drawing(certificate)) for certificate in certificates]
        excerpts = [excerpt(certificate["certified_accuracy"]) for certificate in certificates]
        shown = {"drawings": drawings, "excerpts": excerpts}
        write_page(part, "certificates", numbers, **shown)

    return Work(write=write)


def _headline(certificate: dict[str, Any]) -> str:
    curve, unit = certificate["certified_accuracy"], certificate["radius_unit"]
    radius, share = curve[len(curve) // 2]
    proved = f"Certified accuracy {share:.1%} on {counted(certificate['samples'], 'test sample')}"
    if certificate["integral"]:
        return f"{proved} for up to {radius:g} {unit} inserted or removed"
    return f"{proved} for changes smaller than {radius:g} ({unit})"


def _drawing(certificate: dict[str, Any]) -> str:
    radii, shares = zip(*certificate["certified_accuracy"], strict=True)
    unit = f"radius: {certificate['radius_unit']}"
    return charts.curves(radii, {"certified": shares}, unit, share=True, whole=certificate["integral"])
