"""Results of jobs: small handles on run folders.

    run = CleanRun.open("runs/first")
    run.clean_shards

A result holds the place of the folder; its properties and methods read what the run wrote.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import pyarrow as pa
from pydantic import BaseModel
from torch import nn

from sanitize.data.tables import ShardTables
from sanitize.jobs.run import RECORD, read_config, read_record
from sanitize.packaging import PACKAGE, load_model
from sanitize.storage import join


@dataclass(frozen=True)
class JobResult:
    """Base of all results.

    Attributes:
        folder: path or URL of the run folder.
    """

    place: ClassVar[str] = "run folder"  # the folder, as help texts name it
    folder: str

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The result in a folder.

        Args:
            folder: path or URL of the folder that the job was given as `out`.

        Raises:
            ArtifactError: the folder holds no such result.
        """
        raise NotImplementedError

    @classmethod
    def after(cls, folder: str | Path, summary: dict[str, Any]) -> Self:
        """The result of a job that has just ended with this summary."""
        return cls.open(folder)


@dataclass(frozen=True)
class CallResult(JobResult):
    """Result of a job that adds to a folder and leaves no summary there.

    Attributes:
        folder: path or URL of the folder.
        summary: findings of the call that returned this object, as the command prints them with `--json`; empty where
            the object was opened.
    """

    summary: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The result in a folder, which is not checked."""
        return cls(str(folder).rstrip("/"))

    @classmethod
    def after(cls, folder: str | Path, summary: dict[str, Any]) -> Self:
        """The result of a call with this summary."""
        return cls(str(folder).rstrip("/"), summary)


@dataclass(frozen=True)
class JobRun(JobResult):
    """A finished run."""

    kind: ClassVar[type[BaseModel]]  # class of the config

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The result of a finished run.

        Args:
            folder: path or URL of the run folder.

        Raises:
            ArtifactError: the folder holds no finished run of this job.
        """
        run = cls(str(folder).rstrip("/"))
        read_record(run.folder)
        read_config(run.folder, cls.kind)
        return run

    @property
    def config(self) -> Any:
        """The config of the run."""
        return read_config(self.folder, self.kind)

    @property
    def summary(self) -> dict[str, Any]:
        """Counts and places, as the command prints them with `--json`; places are those at the time of the run."""
        record = read_record(self.folder)
        return {name: value for name, value in record.items() if name not in RECORD}

    def _in(self, *names: str) -> str:
        return join(self.folder, *names)

    def _page(self) -> str:
        return self._in("90-report", "index.html")


@dataclass(frozen=True)
class ModelRun(JobRun):
    """A finished run that ends in a model package."""

    @property
    def package(self) -> str:
        """Path or URL of the model package."""
        return self._in(PACKAGE)

    def model(self, *, trust_code: bool = False) -> nn.Module:
        """The model in eval mode on the CPU; images (B, C, H, W), uint8 or floats on [0, 1], to logits (B, K).

        Args:
            trust_code: see `sanitize.load_model`.
        """
        return load_model(self.package, trust_code=trust_code)


def table_of(tables: ShardTables) -> pa.Table:
    """All rows of all shards in memory, with a first column `shard`."""
    return pa.concat_tables(
        (rows := tables.rows(shard)).add_column(0, "shard", pa.array([shard] * len(rows), pa.string()))
        for shard in tables.shards
    )
