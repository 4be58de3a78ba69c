"""Networks that code outside this package builds, and where such code may be found.

A model package from a stranger may name any function. Nothing is imported for it unless the caller says so, and even
then only from what is installed: never from the working directory or from the package's own folder, where whoever made
the package chooses what the name of a module means.
"""

import importlib
import importlib.util
import site
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from sanitize.errors import ConfigError

_IMPORTING = threading.RLock()  # sys.path is the whole process's


def build_by(function: str, n_classes: int, in_channels: int) -> nn.Module:
    """The network that `function` ("package.module:function") makes.

    Raises:
        ConfigError: it cannot be imported, or makes no network.
    """
    module, _, name = function.partition(":")
    try:
        factory: Callable[..., object] = getattr(importlib.import_module(module), name)
    except Exception as error:  # it is code that is not ours: it may raise anything
        raise ConfigError(f"cannot import {function}: {error}") from error
    try:
        network = factory(n_classes=n_classes, in_channels=in_channels)
    except Exception as error:
        raise ConfigError(f"{function}(n_classes=, in_channels=) raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{function} makes a {type(network).__name__}, not a torch.nn.Module")
    return network


@contextmanager
def only_installed(folder: str) -> Iterator[None]:
    """Within the block imports find nothing in the working directory or in `folder`, that of a model package.

    Modules that are imported already are not affected; see `refuse_unless_installed`.
    """
    with _IMPORTING:
        before = list(sys.path)
        sys.path[:] = [entry for entry in before if _may_hold_code(entry, folder)]
        try:
            yield
        finally:
            sys.path[:] = before


def refuse_unless_installed(function: str, folder: str) -> None:
    """Raise ConfigError unless the module of `function` is an installed one; to be called within `only_installed`.

    Nothing is imported: the top-level module is looked up, and its place compared with the forbidden ones.
    """
    top = function.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ConfigError(
            f"{function} is in no installed package: install the one that holds it (modules in the working directory "
            "or in the folder of the model do not count)"
        )
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.has_location and spec.origin else ())]
    for place in places:
        holds = str(Path(place).parent.parent if Path(place).name == "__init__.py" else Path(place).parent)
        if not _may_hold_code(holds, folder):
            raise ConfigError(f"{function} is found in {holds}: only installed packages may hold the code of a model")


def _may_hold_code(entry: str, folder: str) -> bool:
    """False for the working directory and for `folder`, with all below them but the interpreter's own folders.

    Python makes the relative entries of PYTHONPATH absolute when it starts, so that they cannot be told from others.
    """
    place = Path(entry).resolve()  # "" is the working directory
    if any(place.is_relative_to(home) for home in _interpreter_folders()):
        return True  # of a virtual environment that lies in the working directory
    return not any(place.is_relative_to(Path(root).resolve()) for root in ("", folder.removeprefix("file://")))


def _interpreter_folders() -> set[Path]:
    """Where the standard library and installed packages are."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [sysconfig.get_path(name) for name in names] + [*site.getsitepackages(), site.getusersitepackages()]
    return {Path(folder).resolve() for folder in folders}
