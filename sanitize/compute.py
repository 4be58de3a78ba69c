"""Device, precision, threads and seed of a run, chosen once. Only this file detects the hardware."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sanitize.errors import ConfigError
from sanitize.plural import counted

CPU_ROWS = 32  # rows of a block of `Compute.full_blocks` on the CPU


class Compute(BaseModel):
    """Compute settings; frozen, so that they can be sent to workers.

    Attributes:
        device: "cpu", "cuda" or "cuda:N"; "auto" takes CUDA if torch finds it, and logs the choice. A named device that
            is absent is an error.
        precision: precision of forward and backward passes; statistics are float64, certificates float32 or better.
        seed: seed of all random streams, which are derived from it by name, see `generator`.
        threads: torch threads of one process. One is fastest for the small networks here; two busy processes with two
            threads each cost about ten times the CPU time.
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
                    f"device {self.device!r} is not available: torch finds {torch.cuda.device_count()} CUDA devices; "
                    "set compute.device=cpu (or auto)"
                )
        return self

    @property
    def torch_device(self) -> torch.device:
        """The device, with "auto" resolved."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def numerics(self) -> dict[str, str | int]:
        """Settings that are part of a `Recipe`: seed and precision, not device and threads."""
        return {"seed": self.seed, "precision": self.precision}

    def full_blocks(self, x_BX: Tensor, batch_size: int) -> Iterator[tuple[Tensor, int]]:
        """Rows (B, ...) in blocks of one shape, the last one padded with zeros; and the number of rows of each block.

        Kernels are chosen by the shape of a batch and round differently, so a network gives a row the same bits in
        every division of the data only if all its batches have one shape. A block has `batch_size` rows on a GPU, and
        32 on a CPU, where larger blocks are no faster and a shard of one sample costs a whole block.
        """
        size = CPU_ROWS if self.torch_device.type == "cpu" else batch_size
        for rows_bX in x_BX.split(size) if len(x_BX) else ():
            n = len(rows_bX)
            yield (rows_bX if n == size else torch.cat([rows_bX, x_BX.new_zeros(size - n, *x_BX.shape[1:])])), n

    def activate(self) -> None:
        """Set threads and deterministic kernels in the calling thread; every stage begins with this call."""
        torch.set_num_threads(self.threads)
        # cuBLAS reads this when it is first used; without it deterministic matrix products raise.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling new tensors would only make the use of uninitialised memory repeatable, and costs a tenth of the time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False

    def take_gpu(self, number: int) -> bool:
        """Make "cuda" stand for the GPU of this number in this process; False if the device is the CPU.

        Raises:
            ConfigError: the device is a single GPU by its number.
        """
        if self.torch_device.type == "cpu":
            return False
        if ":" in self.device:
            raise ConfigError(f"device={self.device} is one GPU, and there are several processes: set device=cuda")
        torch.cuda.set_device(number)
        return True

    def describe(self) -> str:
        """One line for the log: device and reason, precision, threads, seed."""
        device = self.torch_device
        seen = counted(torch.cuda.device_count(), "CUDA device")
        why = "as set" if self.device != "auto" else f"auto: torch finds {seen}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return f"{device} ({name}; {why}), {self.precision}, {counted(self.threads, 'thread')}, seed {self.seed}"

    def autocast(self) -> AbstractContextManager[object]:
        """Context for forward passes: bfloat16 autocast, or nothing at float32."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.torch_device.type, dtype=torch.bfloat16)

    def seed_for(self, *names: str | int) -> int:
        """Seed in [0, 2**63) of the random stream `names`; draws from one stream do not change another."""
        text = "/".join(map(str, (self.seed, *names)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
        """Torch generator of the random stream `names`."""
        return torch.Generator(device=device).manual_seed(self.seed_for(*names))

    def seed_global(self, *names: str | int) -> None:
        """Seed torch's global generators, for library code that uses them (layer initialisation, dropout)."""
        torch.manual_seed(self.seed_for(*names))
