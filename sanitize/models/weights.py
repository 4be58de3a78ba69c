"""Weights from files: read without unpickling objects, and compared with the network they are loaded into."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from sanitize.errors import ConfigError, DataError


def load_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file by the restricted unpickler (tensors only).

    Raises:
        DataError: the file is missing, or holds anything but tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _refuse_compressed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"cannot load weights from {path}: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds no state dict of tensors")
    return state


def _refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip with compressed members, which may expand to any size; torch.save compresses none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
                raise ValueError("its members are compressed, which torch.save never does")


def refuse_misfits(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str, dtypes: bool = True
) -> None:
    """Raise ConfigError where names, shapes or dtypes of weights are not the expected ones; it names the first few."""
    problems = [f"no {name}" for name in expected if name not in state]
    problems += [f"{name[:80]!r} is not part of it" for name in state if name not in expected]
    for name, tensor in expected.items():
        found = state.get(name, tensor)
        if found.shape != tensor.shape or (dtypes and found.dtype != tensor.dtype):
            shapes = [f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (found, tensor)]
            problems.append(f"{name} is {shapes[0]}, not {shapes[1]}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(f"the weights in {where} do not fit the architecture: {'; '.join(problems[:3])}{more}")


def load_into(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict strictly. Raises ConfigError with the names of the tensors that do not fit."""
    refuse_misfits(model.state_dict(), state, where, dtypes=False)
    model.load_state_dict(state)
