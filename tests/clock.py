"""A clock that stands still, for what waits for minutes."""

import datetime as dt
import types

import pytest

from sanitize import lease


class Clock:
    """The time of the stores and of the processes that use them; tests set it forward."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1_800_000_000.0
        patch.setattr(lease, "monotonic", lambda: self.now)
        patch.setattr(lease, "time", lambda: self.now)
        patch.setattr("moto.s3.models.utcnow", lambda: self.datetime().replace(tzinfo=None))
        patch.setattr("fsspec.implementations.memory.datetime", types.SimpleNamespace(now=self.datetime))
        patch.setattr(lease, "RENEWED", 1e6)  # threads that renew know no other time than the real one

    def datetime(self, tz: dt.tzinfo = dt.UTC) -> dt.datetime:
        return dt.datetime.fromtimestamp(self.now, tz)
