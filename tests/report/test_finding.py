"""The verdict on a data set: never "nothing" where something is unknown."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.report.finding import find, groups_of

SCORER = {"kind": "toxic_direction", "min_class": 40}
SUSPECT = {"learned": True, "why": "training accuracy 0.95, at least 0.78", "setting": None}


def selection(
    n: int = 100,
    removed: int = 0,
    flagged: int = 0,
    kind: str = "toxic_direction",
    rule: str = "separation",
    **split: float,
) -> dict[str, Any]:
    entry = {"n": n, "removed": removed, "capped": False, "scorers": {kind: {"flagged": flagged, **split}}}
    return {"verdict": "any", "rules": {kind: {"kind": rule}}, "classes": {"0": entry}}


def scorers(verdict: str | None = "nothing", **config: Any) -> dict[str, Any]:
    finding = {} if verdict is None else {"finding": {"verdict": verdict, "why": "two groups are alike", "groups": []}}
    return {"toxic_direction": {"config": SCORER | config, "classes": {"0": {"separation": 1.0}}, **finding}}


@given(
    learned=st.sampled_from([True, False, None]),
    has_suspect=st.booleans(),
    verdict=st.sampled_from([None, "nothing", "inconclusive", "found"]),
    removed=st.sampled_from([0, 7]),
    flagged=st.sampled_from([0, 7]),
    n=st.sampled_from([10, 100]),
    rule=st.sampled_from(["separation", "contamination"]),
)
def test_nothing_stands_out_only_where_everything_is_known(
    learned: bool | None, has_suspect: bool, verdict: str | None, removed: int, flagged: int, n: int, rule: str
) -> None:
    suspect = SUSPECT | {"learned": learned} if has_suspect else None
    finding = find(selection(n, removed, flagged, rule=rule), scorers(verdict), suspect, removed)
    is_found = removed > 0 and flagged > 0 and rule == "separation"
    is_clear = (
        has_suspect
        and learned is True
        and verdict in (None, "nothing")
        and not flagged
        and n >= 40
        and rule == "separation"
    )
    assert finding.verdict == ("found" if is_found else "nothing" if is_clear else "inconclusive")
    assert finding.verdict != "inconclusive" or finding.reasons
    assert finding.verdict != "nothing" or not finding.reasons
    assert finding.plain()["verdict"] == finding.verdict


@pytest.mark.parametrize("kind", ["neighbours", "spectral", "rca"])
def test_without_the_scorer_for_planted_samples_nothing_is_never_said(kind: str) -> None:
    only = {kind: {"config": {"kind": kind}, "classes": {}}}
    assert find(selection(kind=kind, rule="fdr"), only, SUSPECT, 0).verdict == "inconclusive"
    found = find(selection(100, 5, 5, kind, "fdr"), only, SUSPECT, 5)
    assert found.verdict == "found"
    assert list(found.looked_for.values()) == [[kind]]
    assert found.reasons  # planted samples were not looked for
    assert find(selection(100, 5, 5, kind, "contamination"), only, SUSPECT, 5).verdict == "inconclusive"


def test_without_a_finding_a_class_near_the_level_is_inconclusive() -> None:
    near = selection(separation=5.6, level=7.6)
    assert find(near, scorers(None), SUSPECT, 0).verdict == "inconclusive"
    assert find(near, scorers("nothing"), SUSPECT, 0).verdict == "nothing"
    assert find(selection(separation=3.0, level=7.6), scorers(None), SUSPECT, 0).verdict == "nothing"


def test_a_reason_names_class_and_setting() -> None:
    reasons = find(selection(n=10), scorers(), SUSPECT | {"learned": False, "setting": "embedder.max_steps"}, 0).reasons
    assert [reason.setting for reason in reasons] == ["embedder.max_steps", "scorers.0.min_class"]
    assert "class 0 has too few samples" in reasons[1].why


def test_a_few_small_classes_do_not_take_the_verdict_from_the_others() -> None:
    """A long tail: whoever reads "nothing" reads as well which classes it says nothing of."""
    chosen = selection(n=1000)
    chosen["classes"] |= {label: {"n": 20, "removed": 0, "scorers": {}} for label in ("1", "2")}
    fitted = scorers("nothing")
    fitted["toxic_direction"]["finding"]["why"] = "nothing. Not judged, because they are too small: 2 classes (1, 2)"
    found = find(chosen, fitted, SUSPECT, 0)
    assert found.verdict == "nothing"
    assert "2 classes (1, 2)" in found.why
    chosen["classes"] |= {str(label): {"n": 39, "removed": 0, "scorers": {}} for label in range(3, 40)}
    assert find(chosen, fitted, SUSPECT, 0).verdict == "inconclusive"


def test_planted_groups_come_first() -> None:
    groups = [{"label": i, "decision": d, "z": i} for i, d in enumerate(["natural", "unsure", "planted", "burst"])]
    ordered = groups_of([{"finding": {"groups": groups}}, {}])
    assert [group["decision"] for group in ordered] == ["planted", "unsure", "burst", "natural"]
