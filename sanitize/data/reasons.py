"""Reasons of unreadable samples, gathered by kind: reasons of one kind differ in quoted text and numbers only."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

MAX_EXAMPLES = 3  # of each kind
_VARIABLE = re.compile(r"'.*'|\d+")  # from the first to the last quote: quoted text may contain quotes
_DIFFERENT = "…"


class Kind(NamedTuple):
    """Reasons of one kind.

    Attributes:
        reason: the reason, with "…" for what differs.
        n: number of samples.
        examples: the first samples: shard, key, byte (of their first header, in the uncompressed archive), reason.
        largest: the reason with the largest first number.
    """

    reason: str
    n: int
    examples: list[dict[str, Any]]
    largest: str


class Reasons:
    """Reasons so far. The result depends on the order of the shards only in the examples."""

    def __init__(self, max_examples: int | None = MAX_EXAMPLES) -> None:
        self._max_examples = max_examples
        self._counts: dict[tuple[str, ...], int] = {}
        self._values: dict[tuple[str, ...], list[str]] = {}
        self._examples: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        self._largest: dict[tuple[str, ...], tuple[int, str]] = {}

    def add(self, shard: str, rows: pa.Table) -> None:
        """Add the unreadable samples of a shard, given its index rows (columns status, reason, key, start)."""
        bad = rows.filter(pc.not_equal(rows["status"], "ok"))
        columns = zip(*(bad[name].to_pylist() for name in ("reason", "key", "start")), strict=True)
        for reason, key, start in columns:
            fixed, values = _split(reason)
            first = self._values.setdefault(fixed, values)
            if values != first:
                self._values[fixed] = [a if a == b else _unlike(a) for a, b in zip(first, values, strict=True)]
            number = int(values[0][:18]) if values and values[0].isdecimal() else 0
            self._largest[fixed] = max(self._largest.get(fixed, (0, reason)), (number, reason))
            self._counts[fixed] = self._counts.get(fixed, 0) + 1
            examples = self._examples.setdefault(fixed, [])
            if self._max_examples is None or len(examples) < self._max_examples:
                examples.append({"shard": shard, "key": key, "byte": start, "reason": reason})

    def kinds(self) -> list[Kind]:
        """All kinds, the most frequent first."""
        kinds = [
            Kind(_join(fixed, self._values[fixed]), n, self._examples[fixed], self._largest[fixed][1])
            for fixed, n in self._counts.items()
        ]
        return sorted(kinds, key=lambda kind: (-kind.n, kind.reason))

    def counts(self) -> dict[str, int]:
        """Number of samples by reason, the most frequent first."""
        return {kind.reason: kind.n for kind in self.kinds()}

    def most(self, n: int = 3) -> str:
        """The most frequent kinds, each by its first reason, for a message."""
        return "; ".join(
            f"{kind.n:,} x {'for example: ' * (_DIFFERENT in kind.reason)}{kind.examples[0]['reason']}"
            for kind in self.kinds()[:n]
        )


def counted(reasons: Iterable[str]) -> dict[str, int]:
    """Number of reasons by kind, the most frequent first."""
    return gathered(reasons).counts()


def gathered(reasons: Iterable[str]) -> Reasons:
    """Reasons without their samples."""
    found = Reasons()
    texts = list(reasons)
    n = len(texts)
    found.add(
        "", pa.table({"status": ["bad"] * n, "reason": pa.array(texts, pa.string()), "key": [""] * n, "start": [0] * n})
    )
    return found


def _split(reason: str) -> tuple[tuple[str, ...], list[str]]:
    """The fixed texts of a reason, and the variable ones between them."""
    return tuple(_VARIABLE.split(reason)), _VARIABLE.findall(reason)


def differences(reason: str, kind: str) -> str:
    """What a reason has where its kind has "…"; "" for a reason that equals its kind."""
    pairs = zip(_split(reason)[1], re.findall(rf"'.*'|\d+|{_DIFFERENT}", kind), strict=False)
    return ", ".join(value for value, shown in pairs if _DIFFERENT in shown and value != shown)


def _unlike(value: str) -> str:
    return f"'{_DIFFERENT}'" if value.startswith("'") else _DIFFERENT


def _join(fixed: tuple[str, ...], values: list[str]) -> str:
    return "".join(part for pair in zip(fixed, [*values, ""], strict=True) for part in pair)
