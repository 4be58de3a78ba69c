"""The page about the robustness of a model: accuracy under attack, smallest changes, direction of its gradients."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.measure import EvasionConfig, Robustness
from sanitize.report import charts
from sanitize.report.page import Report, write_page
from sanitize.stage import Work, stage

_N_BINS = 40
_N_POINTS = 60  # of a curve


@stage(Report, gpu=False, draws="nothing", version=3)
def write_robustness_report(robustness: Robustness, out: str, compute: Compute) -> Work:
    """Write the page about measured robustness.

    Args:
        robustness: measurements of the model.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused; every stage takes it.
    """
    made = robustness.manifest().recipe
    attack = EvasionConfig.model_validate(made.config["attack"])
    unit = f"{ {'l2': 'l2', 'linf': 'l-infinity'}[attack.norm] }, pixels on [0, 1]"

    def write(part: Part) -> None:
        summary = robustness.summary
        lengths_N = robustness.table()["length"].to_numpy()
        found_n = lengths_N[(lengths_N > 0) & np.isfinite(lengths_N)]
        edges = charts.bin_edges(0.0, attack.radius, None, _N_BINS)
        median = summary["median"]
        smallest = "no image is correct" if median is None else f"median smallest change {median:.3g} ({unit})"
        numbers = {
            "headline": f"Clean accuracy {summary['clean_accuracy']:.1%}; {smallest}.",
            "summary": summary,
            "attack": attack.model_dump(mode="json"),
            "unit": unit,
            "digest": robustness.digest,
            "recipe": made.model_dump(mode="json"),
        }
        radii, shares = zip(*summary["accuracy"], strict=True)
        at = thinned(len(summary["alpha"]))
        drawings = {
            "accuracy": charts.curves(radii, {"accuracy": shares}, f"radius: {unit}", share=True, whole=False),
            "lengths": charts.counts(edges, np.histogram(found_n, edges)[0].tolist(), f"smallest change: {unit}"),
            "alpha": charts.curves(
                [i + 1 for i in at], {"alpha": [summary["alpha"][i] for i in at]}, "components d", share=True
            ),
        }
        shown = {name: Markup(drawing) for name, drawing in drawings.items()}
        write_page(part, "robustness", numbers, **shown)

    return Work(write=write)


def thinned(n: int, most: int = _N_POINTS) -> Sequence[int]:
    """At most about `most` of the indices 0 to n - 1, the first and the last among them."""
    return sorted({*range(0, n, max(1, n // most)), n - 1})
