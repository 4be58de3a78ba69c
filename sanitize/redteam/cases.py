"""Cases of a red team and how they are called: `badnets@1%` is BadNets on 1 % of the data, `none` is nobody at work."""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator

from sanitize.attack import AttackConfig, LabelNoiseConfig, attacks_of
from sanitize.errors import ConfigError

NONE = "none"
_NAME = re.compile(r"([a-z0-9_]+)@(\d{1,3}(?:\.\d{1,6})?)%")


def case_name(attack: AttackConfig | None) -> str:
    """Kind of the attack, and the share of the data that it poisons in per cent; of several attacks, their sum."""
    if attack is None:
        return NONE
    rate = sum((Decimal(str(one.rate)) for one in attacks_of(attack)), Decimal())
    return f"{attack.kind}@{(100 * rate).normalize():f}%"


def attack_called(name: str) -> dict[str, Any]:
    """Settings of the attack that a name stands for, all but kind and rate at their defaults.

    Raises:
        ConfigError: it is no name of a case with an attack.
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
    """What is measured of a case: see `measure.MEASURES`."""
    if attack is None:
        return "false_removals", "acc_before", "acc_after"
    found = ("recall", "precision", *measures_of(None))
    if all(isinstance(one, LabelNoiseConfig) for one in attacks_of(attack)):
        return found
    return *found, "asr_before", "asr_after", "asr_untouched"
