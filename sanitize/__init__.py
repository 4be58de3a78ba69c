"""sanitize: the firewall for training data. Poisoned shards in, trusted data and models out.

    import sanitize

    run = sanitize.clean("data/train-*.tar", out="runs/first")
    mask, scores, evidence = sanitize.find_poison(embeddings, labels)

Each job is a function of this package. The stages that jobs call are functions of a config, finished artifacts, a
folder and a `Compute`; each returns one new artifact. Configs and methods are in the package of their step, for example
`sanitize.score`. `sanitize/api.py` lists all names.
"""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sanitize.api import *  # noqa: F403

__version__ = version("sanitize")


def __getattr__(name: str) -> Any:
    """Names of `sanitize.api` and subpackages, imported at first use: torch takes seconds, and `--help` needs none."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module 'sanitize' has no attribute {name!r}")
    if find_spec(f"sanitize.{name}") is not None:  # also where a module inside is imported while `sanitize.api` is
        return import_module(f"sanitize.{name}")
    try:
        return getattr(import_module("sanitize.api"), name)
    except AttributeError:
        raise AttributeError(f"module 'sanitize' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("sanitize.api").__all__})
