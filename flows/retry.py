"""Which failures of a task Prefect tries again."""

from typing import Any

from sanitize.errors import LostLeaseError, StorageError


def is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Retry what storage does now and then; bad data or configuration will not get better.

    Not in `tasks`: a worker imports the module this is in, and there that would be every job there is.
    """
    error = state.result(raise_on_failure=False)
    return isinstance(error, OSError | StorageError) and not isinstance(error, LostLeaseError)
