"""Weights from files: read without unpickling objects, and compared with the network they are loaded into."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sanitize.artifacts import first_line
from sanitize.errors import ConfigError, DataError

# Under these names training scripts save the weights beside the state of the optimiser; plain weights come first.
ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
EMA_ENTRIES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")  # moving averages of the weights
_MAX_DEPTH = 3  # {"model": {"state_dict": {...}}}
_COUNTERS = ("num_batches_tracked", "n_averaged")  # numbers of training that a network in eval mode does not read


def load_state(path: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file by the restricted unpickler (tensors only).

    Args:
        path: path of the file.
        entry: name of the entry of a torch file that holds the weights, such as "ema"; None takes the file itself, or
            the first of `ENTRIES`, then of `EMA_ENTRIES`, that is there.

    Raises:
        DataError: the file is missing, holds anything but tensors, or has no such entry.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:
            raise DataError(f"cannot load weights from {path}: {first_line(error)}") from error
    saved = _load_tensors(path)
    state = _state_in(saved, entry)
    if state is None:
        names = ", ".join(repr(str(name))[:60] for name in list(saved)[:8]) if isinstance(saved, dict) else ""
        what = f"no weights under {entry!r}" if entry is not None else "no state dict of tensors"
        has = f"; it has {names}: name one of them as `entry`" if names else f", but a {type(saved).__name__}"
        raise DataError(f"{path} holds {what}{has}")
    return state


def _load_tensors(path: Path) -> Any:
    """What a torch file holds: tensors, numbers and texts in dicts and lists. Raises DataError for all else."""
    try:
        _refuse_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds pickled Python objects, which run code when they are loaded; none was loaded. Save the "
            f'weights alone where you trained: torch.save(model.state_dict(), "weights.pt")'
        ) from error
    except Exception as error:
        raise DataError(f"cannot load weights from {path}: {first_line(error)}") from error


def _refuse_archive(path: Path) -> None:
    """Raise ValueError for a zip that `torch.save` of weights does not write.

    Compressed members may expand to any size, and programs (TorchScript, torch.export) are no weights.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
        if any("/code/" in f"/{member.filename}" or member.filename.endswith(".json") for member in members):
            raise ValueError(
                "it is a program (TorchScript or torch.export), not weights: save model.state_dict() instead"
            )
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its members are compressed, which torch.save never does")


def _state_in(saved: Any, entry: str | None) -> dict[str, Tensor] | None:
    """The state dict in what was saved, by the name of its entry or by the usual names; None where there is none."""
    if entry is not None:
        return _tensors(saved.get(entry)) if isinstance(saved, dict) else None
    for _ in range(_MAX_DEPTH):
        if (state := _tensors(saved)) is not None:
            return state
        if not isinstance(saved, dict):
            return None
        saved = next((saved[name] for name in (*ENTRIES, *EMA_ENTRIES) if isinstance(saved.get(name), dict)), None)
    return _tensors(saved)


def _tensors(saved: Any) -> dict[str, Tensor] | None:
    """The tensors by name where `saved` holds nothing else; else None."""
    if not isinstance(saved, dict) or not saved:
        return None
    is_state = all(isinstance(name, str) and isinstance(value, Tensor) for name, value in saved.items())
    return dict(saved) if is_state else None


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


def load_into(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict. Raises ConfigError with the names of the tensors that do not fit.

    Names may have a prefix in common that wrappers add ("module.", "_orig_mod."). Missing counters, and one of the
    names of a tensor that has several (tied weights), are filled from the network.
    """
    expected = model.state_dict()
    state = _completed(expected, without_prefix(state, expected))
    refuse_misfits(expected, state, where, dtypes=False)
    model.load_state_dict(state)


def without_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict without first components of names that all of its tensors share and `expected` does not have."""
    state = {name: tensor for name, tensor in state.items() if name in expected or name not in _COUNTERS}
    while state and not state.keys() & expected.keys():
        first = next(iter(state)).partition(".")[0] + "."
        if not all(name.startswith(first) for name in state):
            break
        state = {name.removeprefix(first): tensor for name, tensor in state.items()}
    return state


def _completed(expected: Mapping[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the names that files may leave out."""
    given = {
        (expected[name].data_ptr(), expected[name].shape): tensor for name, tensor in state.items() if name in expected
    }
    for name, tensor in expected.items():
        if name in state:
            continue
        if name.rpartition(".")[2] in _COUNTERS:
            state[name] = tensor
        elif tensor.numel() and (tied := given.get((tensor.data_ptr(), tensor.shape))) is not None:
            state[name] = tied
    return state


def as_safetensors(model: nn.Module) -> bytes:
    """The weights of a network as safetensors; a tensor with two names (tied weights) is written under both."""
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    return safetensors.torch.save(state)
