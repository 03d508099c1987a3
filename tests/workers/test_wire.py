"""The control channel: which answer is taken for which question."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest

from llama_flash.workers.wire import Wire


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next_one() -> None:
    ours, theirs = socket.socketpair()
    interrupted = threading.Event()

    def serve() -> None:
        other = Wire(theirs)
        first = other.receive()
        os.kill(os.getpid(), signal.SIGINT)  # of Ctrl-C, while the answer is waited for
        assert first is not None and interrupted.wait(20)
        other.send({"to": first["op"]})
        second = other.receive()
        assert second is not None
        other.send({"to": second["op"]})

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=serve)
    try:
        with ours, theirs:
            ours.settimeout(20)
            wire = Wire(ours)
            with pytest.raises(KeyboardInterrupt):
                thread.start()
                wire.ask({"op": "check"})
            interrupted.set()
            assert wire.ask({"op": "stats"}) == {"to": "stats"}
            thread.join(20)
    finally:
        signal.signal(signal.SIGINT, before)
