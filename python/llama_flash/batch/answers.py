"""The file of answers, in OpenAI's form: what is in it already, and one line more for each answer.

A line is written by one call when it is complete. What a process that was killed, or a full disk, has left of a line is
cut off by the next run. An answer's `id` is made of hashes of the model, of the settings and of the request, so that a
run which goes on notices what has changed; nothing is stored beside the file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import FlashError
from ..whole_files import whole_file

__all__ = ["Answers"]

_PREFIX = "batch_req_"
_BEGIN = b'{"id": "' + _PREFIX.encode()  # of a line
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Answers:
    """A file of answers, locked against other runs. To be closed.

    Args:
        path: of the file, which need not exist.
        model, settings: hashes, as hexadecimal digits.
        fresh: what is in the file is not looked at, and goes when `begin` is called.

    Attributes:
        done: keys of the requests that are answered, with an error too.
        n_errors: of these, with an error.

    Raises:
        OSError: it cannot be written.
        FlashError: another run writes it; it is no file of answers.
    """

    def __init__(self, path: Path, model: str, settings: str, *, fresh: bool = False) -> None:
        self._path, self._made = path, (model, settings)
        self.done: set[str] = set()
        self.n_errors = 0
        self._failed: set[str] = set()  # keys of answers with an error
        self._others: Counter[str] = Counter()  # lines of another "model", of other "settings"
        self._end = 0  # bytes of whole lines
        self._is_new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise FlashError(f"{path}: no file; answers need one, in which a second run finds what is done")
            self._lock()
            if not fresh:
                self._look()
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Nothing is left behind where nothing was written."""
        if self._file >= 0:
            if self._is_new and os.fstat(self._file).st_size == 0:
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def check(self, requests: set[str], *, retry: bool) -> None:
        """Whether what is in the file answers `requests` (their keys).

        Args:
            retry: answers with an error do not count as done.

        Raises:
            FlashError: it does not, with what has changed.
        """
        if retry:
            self.done -= self._failed
            self.n_errors = 0
        what = "go on with what it was begun with, name another file, or begin anew (--force)"
        for name, said in (("model", "another model"), ("settings", "another seed or predictor")):
            if n := self._others[name]:
                raise FlashError(f"{self._path}: {n} of its answers are of {said}: {what}")
        if unknown := self.done - requests:
            if unknown <= self._failed:
                what = "--retry asks again what ended in an error"
            raise FlashError(
                f"{self._path}: {len(unknown)} of its answers are to other requests than the input has now, "
                f"as that in {self._place(unknown)}: {what}"
            )

    def begin(self, *, retry: bool) -> None:
        """Now answers will come: what is left of a line is cut off, and with `retry` what ended in an error.

        Raises OSError.
        """
        if retry and self._failed:
            self._leave_out(self._failed)
        os.ftruncate(self._file, self._end)
        os.lseek(self._file, self._end, os.SEEK_SET)

    def write(self, key: str, custom_id: str | None, response: Any, error: Any) -> None:
        """One line more, which the system has when this returns.

        Raises:
            OSError: it could not be written; the file ends with the line before.
        """
        line = {"id": self._id(key), "custom_id": custom_id, "response": response, "error": error}
        data = memoryview(json.dumps(line).encode() + b"\n")
        end = self._end + len(data)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as failure:
            os.ftruncate(self._file, self._end)
            raise self._explained(failure) from None
        self._end = end
        self.done.add(key)

    def sync(self) -> None:
        """Returns when the device has it all. Raises OSError."""
        try:
            os.fsync(self._file)
        except OSError as failure:
            raise self._explained(failure) from None

    def _explained(self, failure: OSError) -> OSError:
        mend = "make room, then run" if failure.errno in _NO_ROOM else "when that is mended, run"
        return OSError(
            f"{self._path}: {failure.strerror}; the {len(self.done)} answers before are kept: "
            f"{mend} the same command again, which goes on from there"
        )

    def _id(self, key: str) -> str:
        return _PREFIX + "".join(self._made) + key

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlashError(f"{self._path}: another run writes it now") from None
        except OSError:  # a file system without locks
            pass

    def _look(self) -> None:
        """What is there."""
        model, settings = self._made
        for number, offset, raw in self._lines():
            if not raw.endswith(b"\n"):
                if not (raw.startswith(_BEGIN) or _BEGIN.startswith(raw)):
                    raise self._no_answers(number)
                break  # a line that was never completed
            key, is_error = self._read(number, raw)
            self._end = offset + len(raw)
            if not key.startswith(model):
                self._others["model"] += 1
            elif not key.startswith(settings, len(model)):
                self._others["settings"] += 1
            else:
                key = key[len(model + settings) :]
                self.done.add(key)
                if is_error:
                    self._failed.add(key)
        self.n_errors = len(self._failed)

    def _read(self, number: int, raw: bytes) -> tuple[str, bool]:
        """The id without its prefix, and whether the answer is an error."""
        try:
            line = json.loads(raw)
            made = str(line["id"])
            if not made.startswith(_PREFIX):
                raise ValueError
            response = line["response"]
            return made.removeprefix(_PREFIX), response is None or response["status_code"] != 200
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._no_answers(number) from None

    def _no_answers(self, number: int) -> FlashError:
        return FlashError(
            f"{self._path}: line {number} is no answer of a batch: name another file, or overwrite it (--force)"
        )

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and text of each line."""
        offset = 0
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, raw in enumerate(file, 1):
                yield number, offset, raw
                offset += len(raw)

    def _place(self, keys: set[str]) -> str:
        """The first line that has one of them, for a message."""
        for number, _, raw in self._lines():
            if self._key(number, raw) in keys:
                custom_id = json.loads(raw)["custom_id"]
                return f"line {number}" + ("" if custom_id is None else f" ({custom_id})")
        return "a line that is gone"

    def _key(self, number: int, raw: bytes) -> str:
        return self._read(number, raw)[0][sum(map(len, self._made)) :]

    def _leave_out(self, keys: set[str]) -> None:
        """Writes the file without them, beside its place, then there."""
        with whole_file(self._path) as kept:
            for number, offset, raw in self._lines():
                if offset >= self._end:
                    break
                if self._key(number, raw) not in keys:
                    kept.write(raw)
            self._end = kept.tell()
        new = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        os.close(self._file)
        self._file = new
        self._lock()
