"""Cases of a red team and their names: `badnets@1%` is BadNets on 1 % of the data, `none` is the unpoisoned data."""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator

from sanitize.attack import AttackConfig
from sanitize.errors import ConfigError

NONE = "none"
_NAME = re.compile(r"([a-z0-9_]+)@(\d{1,3}(?:\.\d{1,6})?)%")


def case_name(attack: AttackConfig | None) -> str:
    """KIND@RATE%, with the summed rate of several attacks; `none` without an attack."""
    if attack is None:
        return NONE
    rate = sum((Decimal(str(one.rate)) for one in attack.attacks), Decimal())
    return f"{attack.kind}@{(100 * rate).normalize():f}%"


def attack_called(name: str) -> dict[str, Any]:
    """Settings of the attack of a name: kind and rate.

    Raises:
        ConfigError: the text is no name of a case with an attack.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"attack {name!r}: expected KIND@RATE% such as badnets@1% or labels@2.5% (case {NONE!r} is always run); an "
            "attack with other settings is a mapping in the YAML file: {kind: badnets, rate: 0.01, size: 5}"
        )
    return {"kind": match[1], "rate": float(Decimal(match[2]) / 100)}  # in binary, 0.3 / 100 is not 0.003


def _as_settings(value: Any) -> Any:
    return attack_called(value) if isinstance(value, str) else value


PlannedAttack = Annotated[AttackConfig, BeforeValidator(_as_settings)]  # settings, or a name


def measures_of(attack: AttackConfig | None) -> tuple[str, ...]:
    """Measures of a case: see `measure.MEASURES`."""
    if attack is None:
        return "false_removals", "acc_before", "acc_after"
    measures = ("recall", "precision", *measures_of(None))
    return (*measures, "asr_before", "asr_after", "asr_baseline") if attack.has_trigger else measures
