"""The verdict on a data set: never "nothing" where something is unknown."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.report.finding import find, groups_of

SCORER = {"kind": "toxic_direction", "min_class": 40}
CANARY = {"kind": "noise", "label": 3, "n": 60, "rate": 0.005, "learned": 1.0, "recall": 0.9, "missed": ""}
PATCH = CANARY | {"kind": "patch", "label": 4, "recall": 1.0}
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


def scorers(verdict: str | None = "nothing", canaries: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    canaries = {"planted": [CANARY, PATCH], "why": ""} if canaries is None else canaries
    finding = {} if verdict is None else {"finding": {"verdict": verdict, "why": "two groups are alike", "groups": []}}
    return {
        "toxic_direction": {
            "config": SCORER | config,
            "classes": {"0": {"separation": 1.0}},
            "canaries": canaries,
            **finding,
        }
    }


@given(
    learned=st.sampled_from([True, False, None]),
    has_suspect=st.booleans(),
    verdict=st.sampled_from([None, "nothing", "inconclusive", "found"]),
    removed=st.sampled_from([0, 7]),
    flagged=st.sampled_from([0, 7]),
    n=st.sampled_from([10, 100]),
    rule=st.sampled_from(["separation", "contamination"]),
    missed=st.sampled_from([["", ""], ["", "not found"], ["not learned", ""], [], None]),
)
def test_nothing_stands_out_only_where_everything_is_known(
    learned: bool | None,
    has_suspect: bool,
    verdict: str | None,
    removed: int,
    flagged: int,
    n: int,
    rule: str,
    missed: list[str] | None,
) -> None:
    canaries: dict[str, Any] = {}
    if missed is not None:
        planted = [one | {"missed": why} for one, why in zip((CANARY, PATCH), missed, strict=False)]
        canaries = {"planted": planted, "why": "" if missed else "there are too few samples"}
    suspect = SUSPECT | {"learned": learned} if has_suspect else None
    finding = find(selection(n, removed, flagged, rule=rule), scorers(verdict, canaries), suspect, removed)
    is_found = removed > 0 and flagged > 0 and rule == "separation"
    is_clear = (
        has_suspect
        and learned is True
        and verdict in (None, "nothing")
        and not flagged
        and n >= 40
        and rule == "separation"
        and missed == ["", ""]
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


def test_an_all_clear_names_what_the_run_saw() -> None:
    finding = find(selection(), scorers(), SUSPECT, 0)
    assert "faint noise on 0.5 % of the samples, labelled 3: recall 0.90" in finding.why
    assert "a small patch on 0.5 % of the samples, labelled 4: recall 1.00" in finding.why
    assert finding.plain()["canaries"] == [CANARY, PATCH]


@pytest.mark.parametrize(
    ("canaries", "suspect", "config", "why", "setting"),
    [
        (
            {"planted": [CANARY | {"learned": 0.2, "missed": "not learned"}, PATCH], "why": ""},
            {"steps": 700},
            {},
            "labelled 3) was not learned: the suspect model gives its label to 20 %",
            "embedder.min_steps=1400",
        ),
        (
            {"planted": [CANARY, PATCH | {"recall": 0.2, "missed": "not found"}], "why": ""},
            {},
            {},
            "labelled 4) was learned, but not found: recall 0.20",
            "compute.seed, for another model",
        ),
        ({"planted": [], "why": "250 samples are too few"}, {}, {}, "could be planted", ""),
        ({}, {}, {}, "no trigger was planted", "embedder.canary={}"),
        ({}, {"given": True}, {}, "the suspect model was given", "embedder.weights=null"),
        ({}, {}, {"evidence": None}, "without evidence", "scorers='[{kind: toxic_direction}]'"),
    ],
)
def test_a_canary_that_was_not_seen_makes_the_verdict_inconclusive(
    canaries: dict[str, Any], suspect: dict[str, Any], config: dict[str, Any], why: str, setting: str
) -> None:
    finding = find(selection(), scorers("nothing", canaries, **config), SUSPECT | suspect, 0)
    assert finding.verdict == "inconclusive"
    (reason,) = finding.reasons
    assert why in reason.why
    assert reason.setting == setting


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
