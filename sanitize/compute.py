"""Device, precision, threads and seed of a run, chosen once. The only file that asks torch which hardware is there."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sanitize.errors import ConfigError

_CPU_ROWS = 32  # of a block of `Compute.full_blocks`


class Compute(BaseModel):
    """Where and how numbers are made; frozen, so that it can be handed to workers.

    Attributes:
        device: "cpu", "cuda" or "cuda:N"; "auto" takes CUDA where torch sees one, and says so. A device that is
            named and absent is an error, never a silent CPU.
        precision: of forward and backward passes; statistics are float64 and certificates float32 or better.
        seed: every random stream is derived from it by name, see `generator`.
        threads: torch threads of one process. One is fastest for the small networks here, and two busy
            processes with two threads each cost about ten times the CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(default=0, ge=0, lt=2**63)
    threads: int = Field(default=1, ge=1, le=1024)

    @model_validator(mode="after")
    def _device_is_there(self) -> Self:
        if self.device.startswith("cuda"):
            index = int(self.device.partition(":")[2] or 0)
            if index >= torch.cuda.device_count():
                raise ConfigError(
                    f"device {self.device!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices; "
                    "set compute.device=cpu (or auto)"
                )
        return self

    @property
    def torch_device(self) -> torch.device:
        """The device itself, "auto" resolved."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def numerics(self) -> dict[str, str | int]:
        """What of this can change results on purpose, for a `Recipe`; device and threads are not part of it."""
        return {"seed": self.seed, "precision": self.precision}

    def full_blocks(self, x_BX: Tensor, batch_size: int) -> Iterator[tuple[Tensor, int]]:
        """Rows (B, ...) in blocks of one shape, the last one filled up with zeros; and how many rows each block has.

        Kernels are chosen by the shape of a batch and round differently, so a network gives a row the same bits in
        every division of the data only if all its batches have one shape. It is `batch_size` on a GPU, which wants
        large ones; and 32 on a CPU, where larger ones are no faster and a shard of one sample costs a whole block.
        """
        size = _CPU_ROWS if self.torch_device.type == "cpu" else batch_size
        for rows_bX in x_BX.split(size) if len(x_BX) else ():
            n = len(rows_bX)
            yield (rows_bX if n == size else torch.cat([rows_bX, x_BX.new_zeros(size - n, *x_BX.shape[1:])])), n

    def activate(self) -> None:
        """Apply threads and deterministic kernels to the calling thread; every stage calls it first."""
        torch.set_num_threads(self.threads)
        # cuBLAS reads this when it is first used; without it deterministic matrix products raise.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling every new tensor would only make the use of uninitialised memory repeatable, at a tenth of the time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False

    def take_gpu(self, number: int) -> bool:
        """Make the GPU of this number the one that "cuda" means in this process; False where the device is the CPU.

        Raises:
            ConfigError: the device is one GPU by its number.
        """
        if self.torch_device.type == "cpu":
            return False
        if ":" in self.device:
            raise ConfigError(f"device={self.device} is one GPU, and there are several processes: set device=cuda")
        torch.cuda.set_device(number)
        return True

    def describe(self) -> str:
        """One line for the log: device and why, precision, threads, seed."""
        device = self.torch_device
        why = "as asked" if self.device != "auto" else f"auto: torch sees {torch.cuda.device_count()} CUDA devices"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return f"{device} ({name}; {why}), {self.precision}, {self.threads} thread(s), seed {self.seed}"

    def autocast(self) -> AbstractContextManager[object]:
        """Context for forward passes: bfloat16 autocast, or nothing at float32."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.torch_device.type, dtype=torch.bfloat16)

    def seed_for(self, *names: str | int) -> int:
        """A seed in [0, 2**63) for the random stream called `names`; a draw added to one stream moves no other."""
        text = "/".join(map(str, (self.seed, *names)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
        """A torch generator for the random stream called `names`, on the CPU unless a device is named."""
        return torch.Generator(device=device).manual_seed(self.seed_for(*names))

    def seed_global(self, *names: str | int) -> None:
        """Seed torch's global generators, for library code (layer initialisation, dropout) that knows no other."""
        torch.manual_seed(self.seed_for(*names))
