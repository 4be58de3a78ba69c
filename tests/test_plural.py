"""Numbers agree with their nouns; and no message writes a plural behind a number by itself."""

import re
from pathlib import Path

import pytest

from sanitize.plural import are, counted, have, were

ROOT = Path(__file__).parent.parent
# A number that data decide, with a noun in the plural right behind it. Limits and settings are not counted by data.
_NOUNS = "shards|samples|images|pictures|classes|batches|copies|files|steps|epochs|groups|components|partitions|reasons"
_BY_HAND = re.compile(rf"\{{[\w.\[\]'()]+:,\}} (?:\w+ )?(?:{_NOUNS})\b|\}}\}} (?:\w+ )?(?:{_NOUNS})\b")
_MANY = (
    "at most",
    "more than",
    "needs",
    "first",
    "asks for",
    "1 to",
    "most affected",
    "{MAX",
    "{_MAX",
    "max_",
    "self._",
)


@pytest.mark.parametrize(
    ("n", "noun", "text"),
    [
        (0, "shard", "0 shards"),
        (1, "shard", "1 shard"),
        (1200, "held-out sample", "1,200 held-out samples"),
        (2, "class", "2 classes"),
        (2, "copy", "2 copies"),
        (2, "key", "2 keys"),
        (2, "batch", "2 batches"),
        (2, "box", "2 boxes"),
        (2, "epoch", "2 epochs"),
    ],
)
def test_the_noun_agrees_with_the_number(n: int, noun: str, text: str) -> None:
    assert counted(n, noun) == text


def test_the_verb_agrees_with_the_number() -> None:
    assert [(are(n), were(n), have(n)) for n in (0, 1, 2)] == [
        ("are", "were", "have"),
        ("is", "was", "has"),
        ("are", "were", "have"),
    ]


def test_messages_take_their_nouns_from_one_place() -> None:
    found = []
    for folder, pattern in (("sanitize", "*.py"), ("flows", "*.py"), ("sanitize", "*.j2")):
        for path in sorted((ROOT / folder).rglob(pattern)):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if _BY_HAND.search(line) and not any(word in line for word in _MANY):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
