"""Networks that are built by code outside this package, and the places where such code may lie.

A model package from a stranger may name any function. Its module is imported only where the caller allows it, and only
from installed packages: never from the working directory or the folder of the model package, where the stranger may
have put a module of any name.
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
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from sanitize.errors import ConfigError

_IMPORTING = threading.RLock()  # all threads share sys.path


class FactoryConfig(BaseModel):
    """A network of the user's: `function` is "package.module:function", called as function(n_classes, in_channels).

    `build` imports and runs that code. In a configuration the user wrote this is wanted. A model package with a
    function is loaded only where the caller allows it (`Checkpoint.trust_code`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["factory"] = "factory"
    function: str = Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$", max_length=200)

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """The network that `function` returns for images of (C, H, W).

        Raises:
            ConfigError: the function cannot be imported, or returns no network.
        """
        return build_by(self.function, n_classes, image_shape[0])


def factory_of(architecture: BaseModel) -> str | None:
    """Function of a `FactoryConfig`; None for any other architecture."""
    return architecture.function if isinstance(architecture, FactoryConfig) else None


def build_by(function: str, n_classes: int, in_channels: int) -> nn.Module:
    """The network that `function` ("package.module:function") returns.

    Raises:
        ConfigError: the function cannot be imported, or returns no network.
    """
    module, _, name = function.partition(":")
    try:
        factory: Callable[..., object] = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's code may raise anything
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
    """Within the block, imports skip the working directory and `folder`, the folder of a model package.

    Modules that have been imported before are not affected; see `refuse_unless_installed`.
    """
    with _IMPORTING:
        before = list(sys.path)
        sys.path[:] = [entry for entry in before if _may_hold_code(entry, folder)]
        try:
            yield
        finally:
            sys.path[:] = before


def refuse_unless_installed(function: str, folder: str) -> None:
    """Raise ConfigError unless the module of `function` is installed; to be called within `only_installed`.

    Nothing is imported: the top-level module is looked up, and its place compared with the forbidden folders.
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
    """False for the working directory, `folder` and all folders below them but the interpreter's own.

    Python makes the relative entries of PYTHONPATH absolute when it starts, so they look like any other entry.
    """
    place = Path(entry).resolve()  # "" is the working directory
    if any(place.is_relative_to(home) for home in _interpreter_folders()):
        return True  # a virtual environment may lie in the working directory
    return not any(place.is_relative_to(Path(root).resolve()) for root in ("", folder.removeprefix("file://")))


def _interpreter_folders() -> set[Path]:
    """Folders of the standard library and of installed packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [sysconfig.get_path(name) for name in names] + [*site.getsitepackages(), site.getusersitepackages()]
    return {Path(folder).resolve() for folder in folders}
