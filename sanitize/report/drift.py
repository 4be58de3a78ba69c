"""The page about the drift of a batch from the reference: the verdict, its reasons, and every test."""

from typing import Any

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.drift import Drift, DriftConfig
from sanitize.report.page import Report, write_page
from sanitize.stage import Work, stage

_N_ROWS = 200  # classes on the page, the most different first
HEADLINES = {
    "accept": "No difference from the reference was found.",
    "hold": "The batch differs from the reference and needs a review.",
    "refit": "The data as a whole has shifted; if this is expected, approve the batch and refit the reference.",
}


@stage(Report, gpu=False, draws="nothing", version=5)
def write_drift_report(drift: Drift, out: str, compute: Compute) -> Work:
    """Write the page about a comparison with the reference.

    Args:
        drift: tests of the batch against the reference.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: unused; every stage takes it.
    """
    made = drift.manifest().recipe

    def write(part: Part) -> None:
        numbers = {
            "headline": HEADLINES[drift.info["verdict"]],
            **{name: drift.info[name] for name in ("verdict", "reasons", "level", "n_compared")},
            "overall": [test for test in drift.info["tests"] if test["label"] is None],
            "classes": _classes(drift.info),
            "limits": {name: made.config[name] for name in DriftConfig.model_fields},
            "digest": drift.digest,
            "recipe": made.model_dump(mode="json"),
        }
        write_page(part, "drift", numbers, n_rows=_N_ROWS)

    return Work(write=write)


def _classes(info: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a class of the batch, the most different first; None for a test that was not made."""
    names = info.get("class_names", {})
    rows = {
        int(label): {
            "label": int(label),
            "name": names.get(label),
            **counts,
            "shift": None,
            "removed": None,
            "alarm": False,
        }
        for label, counts in info["classes"].items()
    }
    for test in info["tests"]:
        if test["label"] is not None:
            row = rows[test["label"]]
            row["alarm"] |= test["alarm"]
            if test["test"] in row:
                row[test["test"]] = test["result"]
    return sorted(rows.values(), key=lambda row: (not row["alarm"], -_shift(row), row["label"]))


def _shift(row: dict[str, Any]) -> float:
    return float(row["shift"]["effect"]) if row["shift"] else -1.0
