"""The state of an unfinished training: one safetensors file, written atomically and read without pickle.

`torch.load(weights_only=True)` is shorter, but it is an unpickler, and a run folder may lie where others can write.
A safetensors file holds tensors and text alone, and a damaged one is one kind of error.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from sanitize.errors import ArtifactError
from sanitize.plural import counted
from sanitize.storage import create

_TENSOR = "__tensor__"
_running: list["Snapshots | None"] = []  # of the trainings in progress, the innermost last


class Snapshots:
    """One file that always holds the newest snapshot.

    Args:
        path: path of the file; its folder exists.
        every: steps from one snapshot to the next.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def load(self) -> dict[str, Any] | None:
        """The newest state, tensors on the CPU; None without a file.

        As in JSON, keys are strings and tuples are lists.

        Raises:
            ArtifactError: the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(self.path, "pt") as file:

                def tensor_or_dict(found: dict[str, Any]) -> Any:
                    return file.get_tensor(found[_TENSOR]) if _TENSOR in found else found

                state: dict[str, Any] = json.loads(file.metadata()["state"], object_hook=tensor_or_dict)
                return state
        except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ArtifactError(f"{self.path} is damaged ({error}); delete it, and training begins anew") from error

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the newest state: dicts and lists of tensors, numbers, strings and None."""
        tensors: dict[str, Tensor] = {}
        text = json.dumps(_without_tensors(state, tensors))
        with create(self.path) as writer:
            writer.write(safetensors.torch.save(tensors, {"state": text}))


@contextmanager
def training(snapshots: Snapshots | None) -> Iterator[None]:
    """Name the snapshots of a training while it runs, for `after_interrupt`; None where it keeps none."""
    _running.append(snapshots)
    try:
        yield
    finally:
        _running.remove(snapshots)


def after_interrupt() -> str:
    """What becomes of the training in progress if the process ends now; "" without one."""
    if not _running:
        return ""
    snapshots = _running[-1]
    if snapshots is None:
        return "the training in progress keeps no snapshots, and begins again"
    if not snapshots.path.exists():
        every = counted(snapshots.every, "step")
        return f"the training in progress has no snapshot yet (one every {every}), and begins again"
    return "the training in progress goes on from its last snapshot"


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The same value with a name in place of each tensor; the tensors are added to `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _without_tensors(one, tensors) for key, one in value.items()}
    return [_without_tensors(one, tensors) for one in value] if isinstance(value, list | tuple) else value


def restore_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load the `state_dict` of an optimizer from a snapshot."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def laid_out(value: Any, like: Tensor) -> Any:
        """A tensor with the strides of its parameter (channels_last, say): fused optimizers walk both side by side."""
        if isinstance(value, Tensor) and value.shape == like.shape:
            return torch.empty_like(like, dtype=value.dtype).copy_(value)
        return value

    state = {
        int(i): {name: laid_out(value, parameters[int(i)]) for name, value in moments.items()}
        for i, moments in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})
