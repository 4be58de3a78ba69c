"""SIGINT, SIGTERM and SIGHUP end a command within seconds: its processes too, with one line and no traceback.

Nothing is unwound. Outputs appear whole or not at all (`sanitize.artifacts`), so a run that ends anywhere goes on when
the same command is run again; unwinding would only wait for threads, workers and a server.

Only the command line uses this. A flow under a Prefect worker keeps Prefect's own signals, which cancel it.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)
INTERRUPTED = "interrupted; run the same command again to go on"
LAST = 0  # in the pipe of signals: no signal has this number
CLEANUP_SECONDS = 2.5  # for what was registered by `before_end`; then the process ends all the same

_cleanups: list[Callable[[int], None]] = []
_signalled = threading.Event()
_seen = threading.Event()  # set by the thread when it has read all signals that came while the block ran
_ending = threading.Lock()
_is_active = False


@contextmanager
def handled() -> Iterator[None]:
    """End this process when a signal comes while the block runs, wherever it is; for the main thread.

    A thread waits for signals, because Python's own handlers wait for the main thread, which may be in a long
    computation. A second signal ends the process at once.
    """
    global _is_active
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_wait_for_signal, args=(reader,), name="sanitize-signals", daemon=True).start()
    _is_active = True
    take_signals()
    try:
        yield
    finally:
        os.write(writer, bytes([LAST]))
        _seen.wait(5)  # the block may have ended by an exception from a signal handler of a library
        if _signalled.is_set():
            threading.Event().wait()  # the thread ends the process
        _set_handlers(_end_now)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINAL_SIGNALS)


def is_active() -> bool:
    """True in a process whose signals are handled here, which `end` may end."""
    return _is_active


def take_signals() -> None:
    """Install the handlers again, where Prefect has installed its own; does nothing in other processes.

    A terminal sends its signals to child processes too, and each would print a traceback. Children inherit the signals
    that this thread blocks; the thread that waits for signals does not block them.
    """
    if _is_active and threading.current_thread() is threading.main_thread():
        _set_handlers(_stand_still)
        signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)


def prepare_workers() -> None:
    """Start Python's resource tracker, which cleans up after killed workers, before the first worker."""
    if not _is_active:
        return
    # The tracker inherits these options, and prints no warnings.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    resource_tracker.ensure_running()
    take_signals()  # the tracker's start unblocks signals


@contextmanager
def before_end(cleanup: Callable[[int], None]) -> Iterator[None]:
    """Let an interrupt call `cleanup` with the signal's number; all cleanups together have CLEANUP_SECONDS."""
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        _cleanups.remove(cleanup)


def end(code: int, line: str) -> NoReturn:
    """Print one line, kill the processes that this one has started, and exit; nothing else is run or flushed."""
    if not _ending.acquire(blocking=False):
        threading.Event().wait()  # another thread ends the process
    _print(line)
    _be_silent()
    for pid in [os.getpid(), *_kill_descendants()]:
        for folder in Path(tempfile.gettempdir()).glob(f"sanitize-{pid}-*"):
            shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)


def _set_handlers(handler: Callable[[int, FrameType | None], None]) -> None:
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup, and background jobs of scripts, ignore some
            signal.signal(signum, handler)


def _stand_still(signum: int, frame: FrameType | None) -> None:
    threading.Event().wait()  # the main thread stops, and prints no errors


def _end_now(signum: int, frame: FrameType | None) -> None:
    end(128 + signum, _message())


def _message() -> str:
    """What happened, what to do, and what becomes of a training in progress, which may begin again."""
    loaded = sys.modules.get("sanitize.snapshots")  # importing it would take torch, and seconds
    after = loaded.after_interrupt() if loaded is not None else ""
    return f"{INTERRUPTED}; {after}" if after else INTERRUPTED


def _wait_for_signal(reader: int) -> None:
    while (signum := os.read(reader, 1)[0]) not in SIGNALS:
        if signum == LAST:
            _seen.set()
    _signalled.set()
    _seen.set()
    cleanup = threading.Thread(target=_clean_up, args=(signum,), daemon=True)
    cleanup.start()
    deadline = time.monotonic() + CLEANUP_SECONDS
    while cleanup.is_alive() and time.monotonic() < deadline:
        if select.select([reader], [], [], 0.05)[0] and os.read(reader, 1)[0] in SIGNALS:
            break
    end(128 + signum, _message())


def _clean_up(signum: int) -> None:
    for cleanup in reversed(_cleanups):
        with suppress(Exception):
            cleanup(signum)


def _print(line: str) -> None:
    if os.environ.get("RANK", "0") != "0":  # only the first process of torchrun prints
        return
    with suppress(OSError):  # the terminal may be gone
        if os.isatty(2):
            os.write(2, b"\r\x1b[K\x1b[?25h")  # bars hide the cursor
        os.write(2, line.encode() + b"\n")


def _be_silent() -> None:
    """Let nothing print after the last line: threads that talk to a server print tracebacks when it is killed."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def _kill_descendants() -> list[int]:
    """Kill children and their children, as often as there are new ones; returns their numbers."""
    # The tracker cleans up after killed workers, then ends by itself.
    excluded = getattr(resource_tracker._resource_tracker, "_pid", None)
    killed: list[int] = []
    for _ in range(5):
        found = [pid for pid in _descendants(os.getpid()) if pid != excluded and pid not in killed]
        if not found:
            break
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        killed += found
    return killed


def _descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    waiting = [ancestor]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _parents() -> dict[int, int]:
    """The parent of each process of this machine."""
    parents = {}
    if Path("/proc/self/stat").exists():
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        return parents
    with suppress(OSError):
        for line in subprocess.run(["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines():
            pid, parent = line.split()
            parents[int(pid)] = int(parent)
    return parents
