"""Kill the write stage, or let one of its system calls fail, and look at what the next run makes of it.

    python tests/select/crash_write.py instants|windows FOLDER

`test_crash.py` runs this as a process of its own. Everything is imported once, and every run of the real
`write_selected` is a fork: that takes milliseconds, a new interpreter seconds. Only a process with one thread forks
safely, so this one forks, kills and looks at files, and leaves everything else to its children. The result is JSON.
"""

import argparse
import builtins
import errno
import gc
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import torch

from sanitize.artifacts import Part, Recipe, make, verify
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import encode_png
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Scores, Selection, write_rows
from sanitize.errors import SanitizeError
from sanitize.select import ContaminationRule, SelectConfig, WriteConfig, select_samples, write_selected

UNTOUCHED = "untouched.tar"
N_KILLS = 200
TEMPORARY = re.compile(r"(?<![^/])\.tmp-[0-9a-f]+-")

# --- processes --------------------------------------------------------------------------------------------------


class Child(NamedTuple):
    """A running fork: its process id, and the pipe on which it reports its result."""

    pid: int
    pipe: int

    def wait(self) -> tuple[int, str]:
        """Exit status (negative: the signal that ended it), and what the work returned or how it failed."""
        with os.fdopen(self.pipe) as stream:
            said = stream.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), said

    def result(self) -> str:
        """What the work returned; RuntimeError if it did not."""
        status, said = self.wait()
        if status != 0:
            raise RuntimeError(f"exit status {status}: {said}")
        return said


def start(work: Callable[[], str]) -> Child:
    """Do `work` in a fork; returns when it has begun. Exit status 1 is an error that the command line explains."""
    assert len(os.listdir("/proc/self/task")) == 1, "only a process with one thread forks safely"  # noqa: PTH208
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        os.read(reader, 1)
        return Child(pid, reader)
    status = 2
    try:
        os.write(writer, b"!")
        said, status = work(), 0
    except (SanitizeError, OSError) as error:
        said, status = f"{type(error).__name__}: {error}", 1
    except BaseException:
        said = traceback.format_exc()
    os.write(writer, said.encode())
    os._exit(status)


def die() -> NoReturn:
    """The end of this process: no exception, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


# --- the stage --------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """The write stage on one data set, and what an uninterrupted run of it leaves."""

    dataset: Dataset
    selection: Selection
    config: WriteConfig = WriteConfig()
    digest: str = ""
    names: tuple[str, ...] = ()

    def write(self, folder: Path) -> str:
        """The real stage, into `folder`; the digest."""
        out = str(folder / "shards")
        return write_selected(self.config, self.dataset, self.selection, out, Compute(device="cpu")).digest

    def uninterrupted(self, folder: Path) -> "Stage":
        """The same stage, knowing what has to come of it."""
        folder.mkdir()
        digest = start(lambda: self.write(folder)).result()
        assert verify(folder / "shards") == []
        return self._replace(digest=digest, names=names_below(folder))

    def rerun(self, folder: Path) -> list[str]:
        """Run again what was interrupted in `folder`, and say in what it differs from an uninterrupted run."""
        status, said = start(lambda: self.write(folder)).wait()
        if (status, said) != (0, self.digest):
            return [f"exit status {status}, {said}"]
        wrong = [Path(problem).name for problem in verify(folder / "shards")]
        wrong += [f"{name} left over" for name in sorted(set(names_below(folder)) - set(self.names))]
        return ["; ".join(wrong)] if wrong else []


def prepared(folder: Path, shards: Sequence[str], n_samples: int) -> Stage:
    """A stage with inputs of its own. They are made in a child, because Parquet is written by threads."""
    start(lambda: prepare(folder, shards, n_samples)).result()
    stage = Stage(Dataset.load(folder / "index"), Selection.load(folder / "selection"))
    for name in start(lambda: imported(stage, folder / "imported")).result().split():
        with suppress(ImportError):  # of what is no file, or wants to be imported by another
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at
    return stage


def imported(stage: Stage, folder: Path) -> str:
    """Names of what the stage imports only when it runs; every fork would do it again, in more time than it works."""
    before = set(sys.modules)
    stage.write(folder)
    return " ".join(sorted(sys.modules.keys() - before))


def prepare(folder: Path, shards: Sequence[str], n_samples: int) -> str:
    """Images of noise; a fifth of them goes, and some have no label. In the shard `UNTOUCHED` everything stays."""
    rng, compute = np.random.default_rng(0), Compute(device="cpu")
    for name in shards:
        path, untouched = folder / "in" / name, name == UNTOUCHED
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as tar:
            for i in range(n_samples):
                image_CHW = torch.from_numpy(rng.integers(0, 256, (3, 24, 24), dtype=np.uint8))
                members = {"png": encode_png(image_CHW)}
                if untouched or i % 20 != 3:
                    members["cls"] = b"2" if untouched else b"%d" % (i % 2)
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    dataset = index_shards(IndexConfig(max_bad_fraction=0.3), str(folder / "in"), str(folder / "index"), compute)

    def write_scores(part: Part) -> None:
        for shard in dataset.shards:
            rows = [row for row in dataset.rows(shard).to_pylist() if row["status"] == "ok"]
            columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("position", "key", "label")}
            scores_N = rng.standard_normal(len(rows)) * [row["label"] < 2 for row in rows]
            write_rows(part, shard, pa.table(columns | {"score": pa.array(scores_N, pa.float32())}))
        part.write_json("scorer.json", {"config": {"kind": "noise"}, "classes": {}})

    scores = make(Scores, folder / "scores", Recipe(stage="noise", inputs={"dataset": dataset.digest}), write_scores)
    rule = ContaminationRule(rate=0.2, factor=1)
    return select_samples(SelectConfig(rule=rule), dataset, [scores], str(folder / "selection"), compute).digest


def names_below(folder: Path) -> tuple[str, ...]:
    """Names of all files and folders below `folder`."""
    return tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*")))


def temporaries(folder: Path) -> set[str]:
    """Files that were begun and not finished."""
    return {name for name in names_below(folder) if "/.tmp-" in name}


# --- killed at any instant --------------------------------------------------------------------------------------


def instants(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kill the stage at `N_KILLS` random instants, one to five times before a run may end."""
    shards = ("a.tar", "b.tar", "c.tar.gz", "deep/d.tar", "deep/e.tgz", UNTOUCHED)
    stage = prepared(folder, shards, n_samples=80).uninterrupted(folder / "expected")
    seconds = median(timed(stage, folder / f"timed-{i}") for i in range(5))
    rng = random.Random(seed)
    kills: list[dict[str, Any]] = []
    problems: list[str] = []
    n_chains = n_late = 0
    while len(kills) < N_KILLS:
        n_chains += 1
        chain = folder / f"chain-{n_chains}"
        chain.mkdir()
        length = rng.randint(1, 5)
        for _ in range(length):
            # A kill alone falls anywhere in the stage; those of a chain share its time, so that it gets on.
            at = rng.uniform(0, seconds if length == 1 else 2 * seconds / length)
            if not killed(lambda out=chain: stage.write(out), at):  # type: ignore[misc]
                n_late += 1
                break
            clean = [
                name
                for name in names_below(chain)
                if "/clean/" in name and Path(name).suffix in (".tar", ".gz", ".tgz")
            ]
            n_shards = sum("/.tmp-" not in name for name in clean)
            kills.append({"seconds": at, "shards": n_shards, "in_a_file": bool(temporaries(chain))})
        problems += [f"chain {n_chains}: {problem}" for problem in stage.rerun(chain)]
        shutil.rmtree(chain)
    return {"seconds": seconds, "chains": n_chains, "late": n_late, "kills": kills, "problems": problems}


def timed(stage: Stage, folder: Path) -> float:
    """Seconds of an uninterrupted run."""
    folder.mkdir()
    child = start(lambda: stage.write(folder))
    begun = time.perf_counter()
    child.result()
    return time.perf_counter() - begun


def killed(work: Callable[[], str], seconds: float) -> bool:
    """Kill `work` that long after it has begun; False where it had ended by then."""
    child = start(work)
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGKILL)
    return child.wait()[0] == -signal.SIGKILL


# --- killed, or failing, in each window -------------------------------------------------------------------------

# What changes files and folders, and the event by which the interpreter reports it (PEP 578): none is overlooked.
CHANGES = {"mkdir": "os.mkdir", "rmdir": "os.rmdir", "unlink": "os.remove", "remove": "os.remove"}
CHANGES |= {"rename": "os.rename", "replace": "os.rename", "link": "os.link", "symlink": "os.symlink"}
CHANGES |= {"truncate": "os.truncate", "ftruncate": "os.truncate", "utime": "os.utime", "chmod": "os.chmod"}
CHANGES |= {"open": "open", "write": "", "close": "", "fsync": "", "fdatasync": ""}
CHANGES |= dict.fromkeys({"pwrite", "writev", "sendfile", "copy_file_range"} & set(dir(os)), "")
TAKES_SPACE = ("open", "write", "mkdir")


class Calls:
    """Stands between a process and the system, sees every call that changes files, and lets one of them go wrong.

    Args:
        at: its number; where there are no more than that, the end of the work is meant.
        how: "killed" before it, "killed halfway" through a write, or "failed".
    """

    def __init__(self, at: int = -1, how: str = "") -> None:
        self.at = at
        self.how = how
        self.seen: list[str] = []
        self.reported: Counter[str] = Counter()

    def watch(self, work: Callable[[], str]) -> str:
        """Do `work`; its result and the calls, as JSON. The process is good for nothing else afterwards."""
        calls, open_file = self, io.open
        for name in CHANGES.keys() - {"open", "write", "close"}:
            setattr(os, name, partial(self._on_path, name, getattr(os, name)))

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                return int(calls.call("write", str(self.name), super().write, data))

            def close(self) -> None:
                if not self.closed:
                    calls.call("close", str(self.name), super().close)

        def open_watched(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            if mode != "wb":
                return open_file(file, mode, *args, **more)
            return io.BufferedWriter(calls.call("open", str(file), File, file, mode))

        io.open = builtins.open = open_watched  # type: ignore[assignment]
        sys.addaudithook(self._report)
        result = work()
        if self.how == "killed" and self.at == len(self.seen):
            die()
        return json.dumps({"result": result, "seen": self.seen, "overlooked": self._overlooked()})

    def _report(self, event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES.values() and (event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR)):
            self.reported[event] += 1

    def _overlooked(self) -> dict[str, int]:
        return dict(self.reported - Counter(CHANGES[call.split()[0]] for call in self.seen))

    def _on_path(self, name: str, function: Callable[..., Any], path: Any, *args: Any, **more: Any) -> Any:
        about = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else path
        return self.call(name, os.fspath(about), function, path, *args, **more)

    def call(self, name: str, path: str, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Let it happen, or not."""
        number = len(self.seen)
        self.seen.append(f"{name} {TEMPORARY.sub('.tmp-', Path(path).name)}")
        if number == self.at and self.how.startswith("killed"):
            if self.how == "killed halfway":
                function(bytes(args[0])[: len(args[0]) // 2])
            die()
        if self.how == "failed" and number >= self.at:
            full = name in TAKES_SPACE and self.seen[self.at].startswith(TAKES_SPACE)
            if full or number == self.at:  # a device fails once, a full disk stays full
                raise OSError(errno.ENOSPC if full else errno.EIO, "injected", path)
        return function(*args, **more)


class Scene(NamedTuple):
    """A folder as an earlier accident left it, and the stages that may go on there after the next one."""

    folder: Path
    stages: tuple[Stage, ...]

    def accident(self, calls: Calls, case: Path) -> tuple[int, str]:
        """Run the first stage in `case`, a copy of the folder, while `calls` stands in between."""
        shutil.copytree(self.folder, case)
        return start(lambda: calls.watch(lambda: self.stages[0].write(case))).wait()

    def problems(self, calls: Calls, case: Path, known: dict[Any, list[str]]) -> list[str]:
        """What is wrong after an accident and the run that follows it; from a known state that run is not repeated."""
        status, said = self.accident(calls, case)
        found = []
        if calls.how.startswith("killed") and status != -signal.SIGKILL:
            found.append(f"not killed: {status}, {said}")
        if calls.how == "failed":
            if status not in (0, 1):
                found.append(f"exit status {status}, {said}")
            found += [f"{name} is left behind" for name in temporaries(case) - temporaries(self.folder)]
        state = self.stages, content_below(case)
        if state not in known:
            known[state] = self.problems_later(case)
        shutil.rmtree(case)
        return found + known[state]

    def problems_later(self, case: Path) -> list[str]:
        """What is wrong after whatever may be run next in `case`."""
        if not (case / "shards").exists():
            return [problem for stage in self.stages for problem in after(stage, case)]
        found = after(self.stages[0], case)
        shutil.rmtree(case / "shards")  # as somebody does who wants the result made again
        return found + [f"result deleted: {problem}" for problem in after(self.stages[0], case)]


def after(stage: Stage, case: Path) -> list[str]:
    """Problems of a rerun in a copy of `case`."""
    copy = case.with_name("copy")
    shutil.copytree(case, copy)
    found = stage.rerun(copy)
    shutil.rmtree(copy)
    return found


def content_below(folder: Path) -> frozenset[tuple[str, bytes | None]]:
    """All files and folders, but for what is random in their names."""
    paths = [(folder / name, TEMPORARY.sub(".tmp-", name)) for name in names_below(folder)]
    return frozenset((name, path.read_bytes() if path.is_file() else None) for path, name in paths)


def windows(folder: Path) -> dict[str, Any]:
    """Kill the stage before and after every call that changes files, cut every write in half, let every call fail.

    After a call is before the next one: nothing changes in between. All this from an empty folder, and again from
    what earlier accidents left.
    """
    stage = prepared(folder, ("deep/a.tar.gz", UNTOUCHED), n_samples=4).uninterrupted(folder / "expected")
    other = stage._replace(config=WriteConfig(gzip_level=1)).uninterrupted(folder / "other")
    (folder / "empty").mkdir()
    empty = Scene(folder / "empty", (stage,))
    calls = json.loads(empty.accident(Calls(), folder / "seen")[1])["seen"]
    writes = [i for i, call in enumerate(calls) if call.startswith("write")]
    last_rename = max(i for i, call in enumerate(calls) if call.startswith(("rename", "replace")))
    empty.accident(Calls(writes[len(writes) // 2], "killed halfway"), folder / "half")
    empty.accident(Calls(last_rename + 1, "killed"), folder / "renamed")
    Scene(folder / "empty", (other,)).accident(Calls(last_rename, "killed"), folder / "foreign")
    scenes = {
        "empty folder": empty,
        "half a write": Scene(folder / "half", (stage,)),
        "not cleaned up": Scene(folder / "renamed", (stage,)),
        "parts of another recipe": Scene(folder / "foreign", (stage, other)),
    }
    known: dict[Any, list[str]] = {}
    found: dict[str, Any] = {"windows": {}, "accidents": 0, "overlooked": {}, "problems": []}
    for name, scene in scenes.items():
        calls = json.loads(scene.accident(Calls(), folder / f"seen from {name}")[1])
        seen = [*calls["seen"], "the end"]
        accidents = [(at, "killed") for at in range(len(seen))]
        accidents += [(at, "killed halfway") for at, call in enumerate(seen) if call.startswith("write")]
        # What a failing call does to the process, it does from any state of the disk.
        earlier = {call for calls in found["windows"].values() for call in calls}
        accidents += [(at, "failed") for at, call in enumerate(seen[:-1]) if call not in earlier]
        for at, how in accidents:
            problems = scene.problems(Calls(at, how), folder / "case", known)
            found["problems"] += [f"{name}, {how} at {seen[at]} (call {at}): {problem}" for problem in problems]
        found["windows"][name] = seen
        found["accidents"] += len(accidents)
        found["overlooked"] |= calls["overlooked"]
    found["states"] = len(known)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("instants", "windows"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    found = instants(options.folder) if options.what == "instants" else windows(options.folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
