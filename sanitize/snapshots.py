"""Where training was: tensors and numbers in one safetensors file, written whole, read without pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from sanitize.errors import ArtifactError
from sanitize.storage import create


class Snapshot(NamedTuple):
    """What has to be put back, and no more.

    Attributes:
        tensors: by name, on the CPU.
        numbers: what JSON holds.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


class Snapshots:
    """One file that always holds the newest snapshot.

    Args:
        path: of the file; its folder exists.
        every: steps from one to the next.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def load(self) -> Snapshot | None:
        """The newest one; None where there is none. Raises ArtifactError where the file is damaged."""
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                return Snapshot(tensors, json.loads(file.metadata()["numbers"]))
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"{self.path} is damaged ({error}); delete it, and training begins anew") from error

    def save(self, snapshot: Snapshot) -> None:
        """Replace the newest."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.tensors.items()}
        with create(self.path) as writer:
            writer.write(safetensors.torch.save(tensors, {"numbers": json.dumps(snapshot.numbers)}))


def optimizer_state(optimizer: Optimizer) -> Snapshot:
    """An optimiser's state: moments by number of the parameter, and its settings."""
    state = optimizer.state_dict()
    tensors = {
        f"{i}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for i, of in state["state"].items()
        for name, value in of.items()
        if value is not None
    }
    return Snapshot(tensors, {"param_groups": state["param_groups"]})


def restore_optimizer(optimizer: Optimizer, snapshot: Snapshot) -> None:
    """Put back what `optimizer_state` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in snapshot.tensors.items():
        i, _, key = name.partition(".")
        state.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": snapshot.numbers["param_groups"]})
    for parameter, of in optimizer.state.items():
        for key, tensor in of.items():
            if tensor.shape == parameter.shape:
                # Fused steps walk through memory: moments must lie in it as their parameter does (channels_last).
                of[key] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under longer names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that `prefixed` named, under their own names."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
