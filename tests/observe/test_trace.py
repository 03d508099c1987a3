"""Traces: recorded is what the cache was asked, and the plugin's policy, replayed, counts what the plugin counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from engines import IO_ENGINES, give_memory, logits_of, open_flash, open_resident, tokens
from neurons import bundled, open_neurons, write_model

from llama_flash import FlashError
from llama_flash.archives import write_archive
from llama_flash.cli.trace import _give_slots
from llama_flash.native.handle import TRACE_ENTRY
from llama_flash.observe.simulate import as_counted
from llama_flash.observe.snapshot import Snapshot
from llama_flash.observe.trace import Recorder, Trace

PROMPT, DECODED = tokens(90, seed=1), tokens(60, seed=2)
FEW = [tokens(n, seed=n) for n in (2, 1, 2)]  # at once: like drafts that are verified


def record(llm: Any, *calls: list[int]) -> Trace:
    with Recorder(llm.flash) as recorder:
        for call in calls:
            llm.eval(call)
        return recorder.trace()


def one_by_one(decoded: list[int]) -> list[list[int]]:
    return [[token] for token in decoded]


@pytest.mark.parametrize(
    ("form", "share", "io_engine"),
    [
        *(("qwen3moe-Q8_0", share, engine) for share in (0.3, 0.5, 0.8) for engine in IO_ENGINES),
        ("qwen3moe-Q4_K", 0.5, "auto"),
        ("gpt-oss-Q8_0", 0.5, "auto"),
    ],
)
def test_the_replay_counts_what_the_run_has_counted(
    form: str, share: float, io_engine: str, model_file: ModelFile
) -> None:
    name, _, kind = form.rpartition("-")
    with open_flash(model_file(name, kind), share=share, io_engine=io_engine, lookahead=False, n_ubatch=64) as llm:
        trace = record(llm, PROMPT, *one_by_one(DECODED), *FEW, tokens(100, seed=3), *one_by_one(DECODED[:20]))
        counted, simulated = as_counted(trace) or pytest.fail("the run is not comparable")
        assert counted == simulated
        assert counted.hits > 0 and counted.misses > 0
        stats = llm.flash.stats().total
        assert (counted.hits, counted.misses) == (stats.hits, stats.misses)


@pytest.mark.parametrize("form", ["arcee", "llama"])
@pytest.mark.parametrize("predictor", ["exact"])
def test_the_replay_counts_what_a_run_on_neurons_has_counted(form: str, predictor: str, model_folder: Path) -> None:
    path = bundled(write_model(model_folder, form, "F32", "reglu" if form == "llama" else None))
    with open_neurons(path, predictor=predictor, share=0.6) as llm:
        trace = record(llm, *one_by_one(DECODED), *FEW)
        counted, simulated = as_counted(trace) or pytest.fail("the run is not comparable")
        assert counted == simulated
        assert counted.hits > 0 and counted.misses > 0
        assert len(trace.record) == llm.flash.stats().total.neurons_active


def test_an_op_that_asks_for_more_than_the_slots_hold_makes_a_run_not_comparable(model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe"), share=0.3) as llm:
        assert as_counted(record(llm, tokens(16))) is None
    with open_flash(model_file("qwen3moe"), share=1.0) as llm:
        counted, simulated = as_counted(record(llm, tokens(16))) or pytest.fail("the run is not comparable")
        assert counted == simulated


def test_what_is_recorded_does_not_depend_on_the_cache(model_file: ModelFile) -> None:
    traces = []
    for share in (0.1, 0.9):
        with open_flash(model_file("qwen3moe"), share=share) as llm:
            traces.append(record(llm, PROMPT, *one_by_one(DECODED)))
    small, large = traces
    assert small.run != large.run
    for column in ("token", "n_tokens", "tensor", "begin", "record", "uses"):
        assert (getattr(small, column) == getattr(large, column)).all()
    assert small.n_decoded == len(DECODED)
    assert small.n_tokens.max() == len(PROMPT) and set(small.n_tokens.tolist()) == {1, len(PROMPT)}
    # each op: the experts of a token, and of a prompt every expert's tokens
    used = np.add.reduceat(small.uses, small.begin[:-1])
    assert (used % small.n_tokens == 0).all() and len(set((used // small.n_tokens).tolist())) == 1


def test_a_file_is_what_was_saved(model_file: ModelFile, tmp_path: Path) -> None:
    with open_flash(model_file("qwen3moe")) as llm:
        trace = record(llm, PROMPT, *one_by_one(DECODED[:5]))
    trace.save(tmp_path / "trace")
    again = Trace.load(tmp_path / "trace")
    assert again.tensors == trace.tensors and again.run == trace.run and again.model == trace.model
    for column in ("token", "n_tokens", "tensor", "begin", "record", "uses"):
        assert (getattr(again, column) == getattr(trace, column)).all()
    assert (tmp_path / "trace").stat().st_size < 2048 + len(trace.record)


def test_what_is_not_a_trace_is_refused_in_one_line(tmp_path: Path, model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe")) as llm:
        trace = record(llm, DECODED[:3])
    whole = tmp_path / "whole.npz"
    trace.save(whole)
    with np.load(whole) as file:
        columns = dict(file)
    bad = tmp_path / "bad.npz"
    for damage in (
        {"record": columns["record"] + 200},
        {"tensor": columns["tensor"] + 200},
        {"size": columns["size"] + 1},
        {"token": columns["token"][:-1]},
        {"header": np.array("{}")},
        {"header": np.array('{"format": "llama-flash trace 99"}')},
    ):
        np.savez(bad, **{**columns, **damage})
        with pytest.raises(ValueError, match=f"{bad} is not a trace"):
            Trace.load(bad)
    bad.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a trace"):
        Trace.load(bad)
    for content in (b"no", b"", b"PK\x03\x04 no archive", whole.read_bytes()[:200]):
        bad.write_bytes(content)
        for cls, what in ((Trace, "a trace"), (Snapshot, "a snapshot")):
            with pytest.raises(ValueError, match=f"^{bad} is not {what} of llama-flash: .+$"):
                cls.load(bad)
    with pytest.raises(ValueError, match="is not a snapshot"):
        Snapshot.load(whole)


class _Full:
    """Fails when it is written."""

    def __array__(self, *_: object, **__: object) -> Any:
        raise OSError("no room")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe")) as llm:
        trace = record(llm, DECODED[:3])
    there = tmp_path / "there.npz"
    there.write_text("before")
    with pytest.raises(OSError, match="no room"):
        write_archive(there, token=trace.token, record=_Full())
    assert there.read_text() == "before" and list(tmp_path.iterdir()) == [there]
    trace.save(there)
    assert Trace.load(there).model == trace.model and list(tmp_path.iterdir()) == [there]


def test_where_nothing_is_cached_there_is_nothing_to_trace(model_file: ModelFile) -> None:
    with open_flash(model_file("llama")) as llm, pytest.raises(FlashError, match="neither experts nor neurons"):
        record(llm)
    with open_resident(model_file("qwen3moe")) as llm:
        assert llm.flash is None


def test_entries_without_room_are_counted_and_a_reader_that_comes_late_is_told(model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe")) as llm:
        session = llm.flash
        whole = len(record(llm, DECODED[:1]).record)
        session.native.trace(10)
        llm.eval(DECODED[1:2])
        entries = np.empty(100, TRACE_ENTRY)
        assert session.native.drain_trace(entries[:4]) == (4, whole - 10)
        assert session.native.drain_trace(entries) == (6, 0)
        session.native.trace(0)
        llm.eval(DECODED[2:3])
        assert session.native.drain_trace(entries) == (0, 0)
        with Recorder(session) as recorder:
            session.native.trace(10)
            with pytest.raises(FlashError, match=f"has lost {whole - 10} records"):
                llm.eval(DECODED[3:4])
            assert recorder.session is session
        llm.eval(DECODED[4:5])  # goes on


def test_a_run_that_began_warm_is_not_compared(model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe")) as llm:
        llm.eval(DECODED[:10])
        assert as_counted(record(llm, *one_by_one(DECODED[10:20]))) is None
        give_memory(llm, 0.3)
        assert as_counted(record(llm, *one_by_one(DECODED[10:20]))) is None, "counts before the change are in it"


def test_answers_do_not_depend_on_being_recorded(model_file: ModelFile) -> None:
    answers = []
    for traced in (False, True):
        with open_flash(model_file("qwen3moe")) as llm:
            if traced:
                with Recorder(llm.flash):
                    answers.append(logits_of(llm, PROMPT, DECODED[:10]))
            else:
                answers.append(logits_of(llm, PROMPT, DECODED[:10]))
    assert (answers[0] == answers[1]).all()


@pytest.mark.parametrize("share", [0.1, 0.36, 0.8])
def test_a_run_has_slots_for_the_share_of_records_that_was_asked_for(share: float, model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe"), lookahead=False) as llm:
        cached = [t for t in llm.flash.native.traced_tensors() if t.n_records]
        wanted = int(share * sum(t.n_records for t in cached))
        _give_slots(llm.flash, share)
        slots = {t.size_class: t.n_slots for t in llm.flash.native.traced_tensors() if t.n_records}
        assert 0 <= sum(slots.values()) - wanted <= len(slots)
        llm.flash.share._granted = llm.flash.native.requirements().min_memory + 1
        with pytest.raises(ValueError, match="slots for 0 of"):
            _give_slots(llm.flash, share)


def test_tensors_are_described(model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe"), what="all") as llm:
        tensors = llm.flash.native.traced_tensors()
        cached = [t for t in tensors if t.n_records]
        assert {t.name.decode().split(".")[2] for t in cached} == {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
        assert len(cached) < len(tensors), "panels are numbered, and have no records"
        for t in cached:
            assert len({o.group for o in cached if o.name.split(b".")[1] == t.name.split(b".")[1]}) == 1
            assert t.n_slots > 0 and t.record_bytes % 512 == 0 and not t.neurons
