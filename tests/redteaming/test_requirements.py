"""The grammar of requirements and of the names of cases: text is parsed and printed again, and errors help."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from sanitize.attack import ATTACKS, BadNetsConfig, LabelNoiseConfig, SeveralConfig, TaCTConfig
from sanitize.errors import ConfigError
from sanitize.redteaming import MEASURES, PlannedAttack, Requirement, case_name, measures_of, parse_requirement
from sanitize.redteaming.cases import attack_called

CASES = {
    "none": measures_of(None),
    "badnets@1%": measures_of(BadNetsConfig(rate=0.01)),
    "labels@2.5%": measures_of(LabelNoiseConfig(rate=0.025)),
}


@given(st.data())
def test_a_requirement_is_printed_as_it_is_parsed(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(sorted(CASES)))
    requirement = Requirement(
        case,
        data.draw(st.sampled_from(CASES[case])),
        data.draw(st.sampled_from([">=", "<="])),
        data.draw(st.integers(0, 1000)) / 1000,
    )
    spaced = str(requirement).replace(":", " : ").replace(requirement.relation, f" {requirement.relation} ")
    assert parse_requirement(str(requirement), CASES) == requirement
    assert parse_requirement(spaced, CASES) == requirement


@given(st.text(max_size=40))
def test_no_text_at_random_is_a_requirement(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_requirement(text, CASES)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("badnets@1%:recall>0.9", "expected CASE:MEASURE>=SHARE"),
        ("badnets@1%:recall==0.9", "expected CASE:MEASURE>=SHARE"),
        ("recall>=0.9", "expected CASE:MEASURE>=SHARE"),
        ("badnets@1%:recall>=-1", "expected CASE:MEASURE>=SHARE"),
        ("badnets@1%:recall>=nan", "expected CASE:MEASURE>=SHARE"),
        ("badnets@1%:recall>=90%", "expected CASE:MEASURE>=SHARE"),
        ("badnets@1%:recall>=90", "write 90 % as 0.9"),
        ("badnets@2%:recall>=0.9", "the cases are none, badnets@1%, labels@2.5%"),
        ("none:recall>=0.9", "the measures of case none are false_removals, acc_before, acc_after"),
        ("labels@2.5%:asr_after<=0.1", "the measures of case labels@2.5% are"),
        ("badnets@1%:f1>=0.9", "the measures of case badnets@1% are"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_help(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_requirement(text, CASES)


@pytest.mark.parametrize(
    ("relation", "mean", "met"),
    [(">=", 0.5, True), (">=", 0.49, False), ("<=", 0.5, True), ("<=", 0.51, False), (">=", None, False)],
)
def test_a_bound_is_kept_or_not(relation: str, mean: float | None, met: bool) -> None:
    assert parse_requirement(f"none:acc_after{relation}0.5", CASES).met_by(mean) is met


def test_a_measure_without_samples_keeps_no_bound() -> None:
    assert not Requirement("badnets@1%", "precision", "<=", 1.0).met_by(None)


@given(st.integers(1, 10**6), st.sampled_from(["badnets", "blended", "wanet"]))
def test_a_name_stands_for_its_attack(millionths: int, kind: str) -> None:
    attack = TypeAdapter(PlannedAttack).validate_python({"kind": kind, "rate": millionths / 10**6})
    assert TypeAdapter(PlannedAttack).validate_python(case_name(attack)) == attack


@pytest.mark.parametrize(
    ("rate", "name"), [(0.01, "badnets@1%"), (0.1, "badnets@10%"), (1, "badnets@100%"), (0.003, "badnets@0.3%")]
)
def test_names_are_short(rate: float, name: str) -> None:
    assert case_name(BadNetsConfig(rate=rate)) == name
    assert attack_called(name) == {"kind": "badnets", "rate": rate}


def test_the_name_of_several_attacks_has_the_sum_of_rates() -> None:
    several = SeveralConfig(attacks=(BadNetsConfig(rate=0.01), LabelNoiseConfig(rate=0.025)))
    assert case_name(several) == "several@3.5%"
    assert measures_of(several) == measures_of(several.attacks[0])


@pytest.mark.parametrize("name", ["badnets", "badnets@1", "badnets@%", "none", "badnets@1%%", "BadNets@1%", "@1%"])
def test_what_is_no_name_is_refused_with_help(name: str) -> None:
    with pytest.raises(ConfigError, match="expected KIND@RATE% such as badnets@1%"):
        attack_called(name)


@pytest.mark.parametrize("name", ["badnets@0%", "badnets@101%", "unknown@1%"])
def test_a_name_of_no_possible_attack_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(PlannedAttack).validate_python(name)


def test_every_measure_is_explained() -> None:
    assert set(measures_of(BadNetsConfig(rate=0.01))) == set(MEASURES)


@pytest.mark.parametrize("kind", [*ATTACKS, "label_consistent"])
def test_every_attack_has_a_name_and_its_settings_are_read_back(kind: str) -> None:
    adapter = TypeAdapter(PlannedAttack)
    attack = adapter.validate_python(f"{kind}@5%")
    assert (attack.kind, attack.rate, case_name(attack)) == (kind, 0.05, f"{kind}@5%")
    assert adapter.validate_json(adapter.dump_json(attack)) == attack


def test_cover_samples_are_not_part_of_the_rate_in_a_name() -> None:
    assert case_name(TaCTConfig(rate=0.01, cover_rate=0.05)) == "tact@1%"
