"""Numbers with their nouns, for messages: "1 shard", "1,200 classes"."""


def counted(n: int, noun: str) -> str:
    """The number with its noun, which is given in the singular; of several words the last one gets the plural."""
    return f"{n:,} {noun if n == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Regular plural of an English noun: classes, copies, keys, epochs."""
    if noun.endswith("epoch"):  # this "ch" is a "k"
        return f"{noun}s"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def are(n: int) -> str:
    """The verb behind a number of things."""
    return "is" if n == 1 else "are"


def were(n: int) -> str:
    """The verb behind a number of things, in the past."""
    return "was" if n == 1 else "were"


def have(n: int) -> str:
    """The verb behind a number of things that have something."""
    return "has" if n == 1 else "have"
