"""The verdict on a data set: never "nothing" where something is unknown."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.report.finding import ANOTHER_MODEL, describe_canary, find, groups_of

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
    assert finding.verdict == "found" or finding.reasons
    assert finding.plain()["verdict"] == finding.verdict
    assert len(finding.why) < 100  # one short sentence
    assert finding.why.count(".") == 1
    said = [finding.why, *(text for reason in finding.reasons for text in reason if text)]
    assert not [(a, b) for a in said for b in said if a is not b and a.rstrip(".").lower() in b.lower()]  # each once
    assert all(reason.why[0].isupper() and reason.why.endswith(".") for reason in finding.reasons)


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


def test_a_reason_names_class_and_remedy() -> None:
    reasons = find(selection(n=10), scorers(), SUSPECT | {"learned": False, "setting": "embedder.max_steps"}, 0).reasons
    remedies = ["change embedder.max_steps", "add samples, or lower scorers.0.min_class"]
    assert [reason.remedy for reason in reasons] == remedies
    assert "Class 0 has too few samples" in reasons[1].why


def test_what_may_be_planted_is_to_be_looked_at() -> None:
    fitted = scorers("inconclusive")
    assert [reason.remedy for reason in find(selection(), fitted, SUSPECT, 0).reasons] == [""]
    fitted["toxic_direction"]["finding"] |= {
        "why": "a group of class 0 may be planted",
        "groups": [{"decision": "unsure"}],
    }
    (reason,) = find(selection(), fitted, SUSPECT, 0, {0: "owl"}).reasons
    assert reason.why == "A group of class 0 (owl) may be planted."
    assert reason.remedy.startswith("look at the group on the report page; another --seed")


def test_an_all_clear_names_what_the_run_saw() -> None:
    finding = find(selection(), scorers(), SUSPECT, 0)
    assert [reason.why for reason in finding.reasons] == [
        "The suspect model has learned its training data.",
        "Two groups are alike.",
        "This run found the triggers that it planted itself.",
    ]
    assert describe_canary(CANARY) == "faint noise on 0.5 % of the samples, labelled 3"
    assert finding.plain()["canaries"] == [CANARY, PATCH]


@pytest.mark.parametrize(
    ("canaries", "suspect", "config", "why", "remedy"),
    [
        (
            {"planted": [CANARY | {"learned": 0.2, "missed": "not learned"}, PATCH], "why": ""},
            {"steps": 700},
            {},
            "labelled 3) was not learned: the suspect model gives its label to 20 %",
            "set embedder.min_steps=1400",
        ),
        (
            {"planted": [CANARY, PATCH | {"recall": 0.2, "missed": "not found"}], "why": ""},
            {},
            {},
            "labelled 4) was learned, but not found: recall 0.20",
            ANOTHER_MODEL,
        ),
        ({"planted": [], "why": "250 samples are too few"}, {}, {}, "could be planted", ""),
        ({}, {}, {}, "No trigger was planted", "set embedder.canary={}"),
        ({}, {"given": True}, {}, "the suspect model was given", "set embedder.weights=null"),
        ({}, {}, {"evidence": None}, "without evidence", "set scorers='[{kind: toxic_direction}]'"),
    ],
)
def test_a_canary_that_was_not_seen_makes_the_verdict_inconclusive(
    canaries: dict[str, Any], suspect: dict[str, Any], config: dict[str, Any], why: str, remedy: str
) -> None:
    finding = find(selection(), scorers("nothing", canaries, **config), SUSPECT | suspect, 0)
    assert finding.verdict == "inconclusive"
    (reason,) = finding.reasons
    assert why in reason.why
    assert reason.remedy == remedy


def test_a_few_small_classes_do_not_take_the_verdict_from_the_others() -> None:
    """A long tail: whoever reads "nothing" reads as well which classes it says nothing of."""
    chosen = selection(n=1000)
    chosen["classes"] |= {label: {"n": 20, "removed": 0, "scorers": {}} for label in ("1", "2")}
    fitted = scorers("nothing")
    fitted["toxic_direction"]["finding"]["why"] = "nothing. Not judged, because they are too small: 2 classes (1, 2)"
    found = find(chosen, fitted, SUSPECT, 0)
    assert found.verdict == "nothing"
    assert "Not judged, because they are too small: 2 classes (1, 2)." in [reason.why for reason in found.reasons]
    chosen["classes"] |= {str(label): {"n": 39, "removed": 0, "scorers": {}} for label in range(3, 40)}
    assert find(chosen, fitted, SUSPECT, 0).verdict == "inconclusive"


def test_planted_groups_come_first() -> None:
    groups = [{"label": i, "decision": d, "z": i} for i, d in enumerate(["natural", "unsure", "planted", "burst"])]
    ordered = groups_of([{"finding": {"groups": groups}}, {}])
    assert [group["decision"] for group in ordered] == ["planted", "unsure", "burst", "natural"]
