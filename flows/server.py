"""The temporary Prefect server of a command, and whether a server answers.

`python -m flows.server PORT` is the server. It ends when its standard input does, that is when the process that started
it has ended, however it ended. Prefect's own temporary server keeps running after a process that is killed.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx

from sanitize.errors import StorageError

PERIOD_SECONDS = 5.0  # between two health checks of the server
ANSWER_SECONDS = 10.0  # time limit of a health check
PATIENCE_SECONDS = 35.0  # of failed health checks until the server counts as dead; a busy server is slow at times

_temporary: tuple[str, subprocess.Popen[bytes]] | None = None


def temporary_server(settings: Mapping[str, str]) -> str:
    """API URL of a server that lives as long as this process; started by the first call.

    Args:
        settings: environment variables with Prefect's settings.

    Raises:
        StorageError: it does not start.
    """
    global _temporary
    if _temporary is None or _temporary[1].poll() is not None:
        port = _free_port()
        alone = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        command = [sys.executable, "-m", "flows.server", str(port)]
        # A session of its own: Ctrl-C in a terminal reaches the command, which still has to tell the server about it.
        process = subprocess.Popen(
            command, env={**os.environ, **settings, **alone}, stdin=subprocess.PIPE, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}/api"
        _wait_for(url, process)
        _temporary = url, process
    return _temporary[0]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    patience = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])  # set in `flows`
    deadline = time.monotonic() + patience
    while not answers(url):
        if process.poll() is not None:
            raise StorageError(f"Prefect's temporary server ended with exit code {process.returncode}; use --direct")
        if time.monotonic() > deadline:
            process.kill()
            raise StorageError(
                f"Prefect's temporary server did not start within {patience:.0f} s; use --direct, or set "
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more"
            )
        time.sleep(0.1)


def answers(url: str) -> bool:
    """True if the health check gets any answer, other than that of a proxy without a server."""
    try:
        # Unverified: nothing secret is sent, and nothing but the status is read.
        return httpx.get(f"{url}/health", timeout=ANSWER_SECONDS, verify=False).status_code < 500
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def does_not_answer(url: str) -> str:
    """Message about a server that does not answer."""
    shown = urlsplit(url)
    place = f"{shown.scheme}://{shown.netloc.rpartition('@')[2]}{shown.path}"  # without a password
    return f"the Prefect server at {place} does not answer; run the same command again to go on, or use --direct"


@contextmanager
def watched(url: str, when_dead: Callable[[], None]) -> Iterator[None]:
    """Call `when_dead` in a thread, within a minute, if the server does not answer while the block runs."""
    done = threading.Event()

    def watch() -> None:
        silent_since = None
        while not done.wait(PERIOD_SECONDS):
            started = time.monotonic()
            if answers(url):
                silent_since = None
                continue
            silent_since = silent_since or started
            is_dead = time.monotonic() - silent_since > PATIENCE_SECONDS or _has_ended(url)
            if is_dead and not done.is_set():
                when_dead()
                return

    thread = threading.Thread(target=watch, name="sanitize-server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def _has_ended(url: str) -> bool:
    """True for the temporary server if its process has ended."""
    return _temporary is not None and _temporary[0] == url and _temporary[1].poll() is not None


def _serve(port: int) -> None:
    import uvicorn  # Prefect's own web server

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
