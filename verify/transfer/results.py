"""Results on disk: one JSON line a run, appended whole: a sweep killed at any moment has lost no finished run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from widthwise.derive.errors import DeriveError
from widthwise.verify.transfer.config import Run

try:
    import fcntl
except ImportError:  # no such locks on this system: two sweeps do not notice each other
    fcntl = None  # type: ignore[assignment]


class Results:
    """A results file. A last line cut short by a kill or a full disk is taken away before anything is added."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, dict[str, Any]]:
        """Every finished run by its key.

        Raises:
            DeriveError: for a file that holds something else.
        """
        if not self.path.exists():
            return {}
        text = _guarded(self.path.read_bytes, self.path)
        whole, _, _torn = text.rpartition(b"\n")
        found = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry
            except (ValueError, TypeError, KeyError):
                raise DeriveError(
                    f"line {number} of {self.path} is no result of a run", cure="give another file, or mend this one"
                ) from None
        return found

    def add(self, run: Run, outcome: Mapping[str, Any]) -> dict[str, Any]:
        """Append one finished run, and wait until it is on disk. The outcome may be a whole entry of another file.

        Raises:
            DeriveError: when it cannot be written; the lines before it are untouched.
        """
        entry = {**outcome, "key": run.key, **asdict(run)}
        line = json.dumps(entry, sort_keys=True).encode() + b"\n"
        _guarded(lambda: self._append(line), self.path)
        return entry

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other sweeps from writing here, which would train the same runs and could cut off each other's lines.
        The claim ends with the process, however that ends.

        Raises:
            DeriveError: when another sweep has claimed the file.
        """
        with self._claim() as file:
            try:
                yield
            finally:
                with suppress(OSError):  # some systems keep a file that is open
                    if self._holds(file) and self.path.stat().st_size == 0:  # nothing was finished
                        self.path.unlink()

    def _claim(self) -> BinaryIO:
        while True:
            file: BinaryIO = _guarded(self._open, self.path)
            if not _locked(file):
                file.close()
                raise DeriveError(
                    f"another sweep (or train) is writing to {self.path}",
                    cure="let it finish, or give another file by --output",
                )
            if self._holds(file):
                return file
            file.close()  # whoever had it took it away, empty, after it was opened here

    def _holds(self, file: BinaryIO) -> bool:
        """Whether what is open is what the path names: a lock belongs to the former, lines go to the latter."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return open(self.path, "ab")

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", buffering=0) as file:  # a buffer would be written again by truncating and closing
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            if whole < end:
                file.truncate(whole)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)
                raise


def _locked(file: BinaryIO) -> bool:
    """False where another process has the file locked; a file system without locks has none to notice."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _guarded(action: Any, path: Path) -> Any:
    try:
        return action()
    except OSError as error:
        raise DeriveError(
            f"{path}: {error.strerror}", cure="make room or give another file; what was finished is kept"
        ) from None
