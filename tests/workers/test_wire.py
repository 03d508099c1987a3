"""The control channel: which answer is taken for which question."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest

from llama_flash import FlashError
from llama_flash.workers.wire import Pulse, Wire


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next_one() -> None:
    ours, theirs = socket.socketpair()
    interrupted = threading.Event()

    def serve() -> None:
        other = Wire(theirs)
        first = other.receive()
        os.kill(os.getpid(), signal.SIGINT)  # of Ctrl-C, while the answer is waited for
        assert first is not None and interrupted.wait(200)
        other.send({"to": first["op"]})
        second = other.receive()
        assert second is not None
        other.send({"to": second["op"]})

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=serve)
    try:
        with ours, theirs:
            ours.settimeout(200)
            wire = Wire(ours)
            with pytest.raises(KeyboardInterrupt):
                thread.start()
                wire.ask({"op": "check"})
            interrupted.set()
            assert wire.ask({"op": "stats"}) == {"to": "stats"}
            thread.join(200)
    finally:
        signal.signal(signal.SIGINT, before)


def test_who_waits_for_a_long_answer_hears_that_it_is_worked_on() -> None:
    ours, theirs = socket.socketpair()
    heard = threading.Event()

    def serve() -> None:
        other = Wire(theirs)
        pulse = Pulse(other)
        pulse.seconds = 0.02
        while (line := other.receive()) is not None:
            with pulse.working():
                assert heard.wait(200)
                time.sleep(0.2)  # some signs of life come before each answer
            other.send({"to": line["op"]})

    thread = threading.Thread(target=serve)
    with theirs:
        with ours:
            ours.settimeout(200)
            wire = Wire(ours)
            thread.start()
            wire.send({"op": "attach"})
            signs = [wire.receive() for _ in range(3)]
            assert signs == [{"at": "work"}] * 3
            heard.set()
            while (answer := wire.receive()) == signs[0]:
                pass
            assert answer == {"to": "attach"}
            assert wire.ask({"op": "few"}) == {"to": "few"}
        thread.join(200)


def test_who_gives_up_says_why_in_place_of_an_answer_that_is_not_ready() -> None:
    ours, theirs = socket.socketpair()
    gave_up = threading.Event()

    def serve() -> None:
        other = Wire(theirs)
        pulse = Pulse(other)
        assert other.receive() == {"op": "stats"}
        with pulse.working():  # it never ends
            pulse.give_up("a drive does not answer")
            gave_up.set()

    thread = threading.Thread(target=serve, daemon=True)  # it would wait for its turn for good
    with ours, theirs:
        ours.settimeout(200)
        thread.start()
        with pytest.raises(FlashError, match="a drive does not answer"):
            Wire(ours).ask({"op": "stats"})
        assert gave_up.wait(200)
