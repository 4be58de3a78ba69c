"""Names of the trusted shards."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from sanitize.errors import ConfigError
from sanitize.plural import counted


def trusted_shards(patterns: Sequence[str], shards: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the shards that match a pattern, sorted.

    Args:
        patterns: names or places of shards, or globs.
        shards: name -> place of all shards of the run.

    Raises:
        ConfigError: a pattern matches no shard, or all shards are trusted.
    """
    found: set[str] = set()
    for pattern in patterns:
        named = {name for name, url in shards.items() if fnmatchcase(name, pattern) or fnmatchcase(url, pattern)}
        if not named:
            raise ConfigError(
                f"trusted: {pattern!r} names none of {counted(len(shards), 'shard')} (such as {min(shards)!r}); "
                "trusted shards must be among `shards`"
            )
        found |= named
    if len(found) == len(shards):
        raise ConfigError("all shards are trusted: there is nothing left to judge")
    return tuple(sorted(found))
