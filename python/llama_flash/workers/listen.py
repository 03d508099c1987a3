"""A worker's door: it listens, asks for the token, and starts a process for the one client that it has at a time.

What a client sends is computed in a process of its own (serving.py): whatever it does to it, this one goes on. It
knows neither engine nor numpy, and stays small.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..addresses import address_of
from ..errors import FlashError
from .wire import FIRST_LINE, Line, Wire, is_loopback, keep_alive

__all__ = ["Listener", "Settings", "read_token"]

_FIRST_SECONDS = 5.0  # in which a connection must say what it is for
_WAITING = 16  # connections that have not said it yet
_LEAVING = 2.0  # seconds in which the process of a client that has left ends by itself
_ENDING = 10.0  # seconds that a client's process may take to end
_LOOK = 1.0  # seconds from one look at signals to the next: one that comes just before accept() does not end its wait

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Of a worker."""

    model: Path
    listen: str = "127.0.0.1:50052"
    token_file: Path | None = None
    anywhere: bool = False  # whether it may listen at an address that others reach
    options: tuple[tuple[str, Any], ...] = ()  # of FlashOffload
    n_threads: int = 0
    read_timeout: float = 30.0  # seconds that one read may take; 0: as long as it does


@dataclass
class _Guest:
    """The client that is served."""

    name: str  # its address
    key: str  # what its connection for data says
    process: subprocess.Popen[bytes]
    channel: socket.socket  # to that process, for connections
    control: socket.socket  # which that process answers
    stuck: str = ""  # why it is still there, though its client has left

    def is_there(self) -> bool:
        """Whether it is being served. A process whose client has left is ended, also where it hangs."""
        if self.process.poll() is not None:
            return False
        if self.stuck:  # it was killed, and nobody waits for it again
            return True
        poll = select.poll()
        poll.register(self.control, select.POLLRDHUP)
        if not poll.poll(0):
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_LEAVING)
        self.process.kill()
        try:
            self.process.wait(_LEAVING)
        except subprocess.TimeoutExpired:  # in the kernel, which waits for a drive
            self.stuck = ", which has left, and whose process waits for a drive that does not answer"
            return True
        return False


def read_token(path: Path | None) -> str:
    """The first line of the file; "" without one.

    Raises:
        FlashError: it is empty, or others may read it.
        OSError: it cannot be read.
    """
    if path is None:
        return ""
    if path.stat().st_mode & 0o077:
        raise FlashError(f"{path}: others may read it (chmod 600 {path})")
    token = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    if not token or len(token) > FIRST_LINE // 4:
        raise FlashError(
            f"{path}: its first line is no token: it is empty, or longer than {FIRST_LINE // 4} characters"
        )
    return token


class Listener:
    """Serves one client after the other until `stop`.

    Raises:
        FlashError: the address is reached by others, and it was not said that it may be; or a bad token file.
        OSError: it cannot listen there.
    """

    def __init__(self, settings: Settings, say: Say) -> None:
        self._settings, self._say = settings, say
        self._token = read_token(settings.token_file)
        host, port = address_of(settings.listen, least_port=0)
        if not settings.anywhere and not is_loopback(host):
            raise FlashError(
                f"{settings.listen} is reached by other hosts, and what is sent is not encrypted: listen at 127.0.0.1 "
                "and let clients come through an SSH tunnel, or say --listen-anywhere on a private network"
            )
        self._socket = socket.create_server((host, port), backlog=_WAITING, reuse_port=False)
        self._socket.settimeout(_LOOK)
        self.address = "{}:{}".format(*self._socket.getsockname()[:2])
        self._lock = threading.Lock()
        self._free = threading.Semaphore(_WAITING)
        self._guest: _Guest | None = None
        self._stopping = False

    def run(self) -> None:
        """Until `stop` is called."""
        while True:
            try:
                connection, peer = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:
                if self._stopping:
                    break
                raise
            if not self._free.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._meet, args=(connection, "{}:{}".format(*peer[:2])), daemon=True).start()
        self._end_guest()

    def stop(self) -> None:
        """From a signal handler or another thread. What is being computed is given up."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _meet(self, connection: socket.socket, peer: str) -> None:
        try:
            connection.settimeout(_FIRST_SECONDS)
            keep_alive(connection)
            wire = Wire(connection)
            line = wire.receive(FIRST_LINE, exactly=True)
            if line is not None:
                answer = self._admit(line, connection, peer)
                if answer is not None:
                    wire.send(answer)
        except (OSError, FlashError) as error:
            with contextlib.suppress(OSError):
                Wire(connection).send(_no("protocol", str(error)))
        finally:
            self._free.release()
            connection.close()  # the client's process has its own

    def _admit(self, line: Line, connection: socket.socket, peer: str) -> Line | None:
        """What to answer; None: the client's process does."""
        token = line.get("token", "")
        if not isinstance(token, str) or not hmac.compare_digest(token.encode(), self._token.encode()):
            self._say(f"refused {peer}: not the token")
            return _no("token", "not the token of this worker: name the same token file")
        if line.get("op") == "open":
            return self._open(connection, peer)
        if line.get("op") == "data":
            return self._data(connection, str(line.get("key", "")))
        return _no("protocol", "the first line says neither open nor data")

    def _open(self, connection: socket.socket, peer: str) -> Line | None:
        with self._lock:
            guest = self._guest
            if guest is not None and guest.is_there():
                return _no("busy", f"busy: it serves {guest.name}{guest.stuck}, and one client at a time")
            if self._stopping:
                return _no("busy", "it is stopping")
            ours, theirs = socket.socketpair()
            settings, key = self._settings, secrets.token_hex(16)
            about = {
                "model": str(settings.model),
                "options": dict(settings.options),
                "n_threads": settings.n_threads,
                "read_timeout": settings.read_timeout,
                "key": key,
                "control": connection.fileno(),
                "channel": theirs.fileno(),
            }
            command = [sys.executable, "-m", "llama_flash.workers.serving"]
            connection.settimeout(None)
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=(connection.fileno(), theirs.fileno()), start_new_session=True
            )
            theirs.close()
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended
                process.stdin.write(json.dumps(about).encode())
                process.stdin.close()
            self._guest = _Guest(peer, key, process, ours, connection.dup())
        self._say(f"serves {peer}")
        threading.Thread(target=self._wait, args=(self._guest,), daemon=True).start()
        return None

    def _data(self, connection: socket.socket, key: str) -> Line | None:
        with self._lock:
            guest = self._guest
            if guest is None or guest.process.poll() is not None or not hmac.compare_digest(key, guest.key):
                return _no("protocol", "no such session: it has ended")
            connection.settimeout(None)
            Wire(connection).send({"ok": True})
            socket.send_fds(guest.channel, [b"d"], [connection.fileno()])
        return None

    def _wait(self, guest: _Guest) -> None:
        code = guest.process.wait()
        guest.channel.close()
        guest.control.close()
        ended = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        self._say(f"{guest.name} has left" if code == 0 else f"the process for {guest.name} ended with {ended}")

    def _end_guest(self) -> None:
        with self._lock:
            guest = self._guest
        if guest is None or guest.process.poll() is not None:
            return
        guest.process.terminate()
        try:
            guest.process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            guest.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # in the kernel, which waits for a drive
                guest.process.wait(_LEAVING)


def _no(kind: str, message: str) -> Line:
    return {"error": {"kind": kind, "message": message}}
