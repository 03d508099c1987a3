"""Drafts by the head in a model's own file: the answers are the same bytes, and its guesses those of a head that has
seen the text at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from engines import Model
from llama_cpp import llama_cpp_ext as ext
from mtp_models import write_mtp
from test_drafts import always_drafting

import llama_flash
from llama_flash import FlashError, FlashOffload
from llama_flash.model.gguf import read_gguf
from llama_flash.model.load import new_context
from llama_flash.model.mtp import mtp_head
from llama_flash.planning.drafted import mtp_params

PROMPT = [(7 * i * i + 3 * i) % 500 + 3 for i in range(97)]
DENSE, MIXTURE = "mimo2", "glm4moe"
EVERY = ("cohere2moe", "deepseek2", "deepseek32", "glm-dsa", MIXTURE, "hy_v3", DENSE, "step35")

HeadFile = Callable[..., Path]


@pytest.fixture(scope="module")
def head_file(model_folder: Path) -> HeadFile:
    """head_file(arch, **options): see write_mtp."""

    @cache
    def make(arch: str, **options: Any) -> Path:
        name = "-".join([arch, *(f"{key}{value}" for key, value in options.items())])
        return write_mtp(arch, model_folder / f"{name}.gguf", dense=arch == DENSE, **options)

    return make


def opened(path: Path, draft: Any, what: Any = "all", **options: Any) -> Model:
    """With a part of its weights on flash; what "none": all are in memory."""
    flash: Any = FlashOffload(
        what="auto" if what == "none" else what, draft=draft, panel_bytes=65536, follow=False, warm_start=False
    )
    settings = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "verbose": False} | options
    llm = Model(str(path), flash_offload=flash, **settings)
    session = llm.flash
    assert session is not None and (session.native is None) == (what == "none")
    if session.native is not None:
        session.native.set_memory(session.native.requirements().min_memory + (1 << 20))
    return llm


def tokens_of(llm: Model, n: int, prompt: list[int] = PROMPT, **sampling: Any) -> list[int]:
    return list(islice(llm.generate(prompt, **sampling), n))


def answers(llm: Model) -> list[list[int]]:
    """Greedy and sampled, of a new text, one that goes on behind a part of the last, and one from its middle."""
    said = [tokens_of(llm, 50, temp=0.0)]
    for seed, prompt in enumerate((PROMPT + said[0][:20], [*PROMPT[:40], 9, 8, 7], PROMPT[::-1])):
        llm.set_seed(seed)
        said.append(tokens_of(llm, 40, prompt, temp=0.4, repeat_penalty=1.1 if seed else 1.0))
    return said


@pytest.mark.parametrize("what", ["all", "experts", "none"])
@pytest.mark.parametrize("arch", [DENSE, MIXTURE])
def test_answers_are_the_same_and_some_guesses_were_right(head_file: HeadFile, arch: str, what: str) -> None:
    if arch == DENSE and what == "experts":
        what = "ffn"
    path = head_file(arch)
    with opened(path, "off", what) as plain, opened(path, "mtp", what) as llm:
        always_drafting(llm, 5)
        assert answers(llm) == answers(plain)
        drafts = llm.flash.stats().drafts
        assert drafts.source == "mtp" and 10 < drafts.accepted < drafts.drafted - 10, "texts went on, and went back"
        assert drafts.tokens_per_pass > 1


@pytest.mark.parametrize("arch", EVERY)
def test_every_architecture_with_a_head_gives_the_same_answer(head_file: HeadFile, arch: str) -> None:
    path = head_file(arch)
    with opened(path, "off") as plain, opened(path, "mtp") as llm:
        always_drafting(llm, 4)
        assert tokens_of(llm, 60, temp=0.0) == tokens_of(plain, 60, temp=0.0)
        drafts = llm.flash.stats().drafts
        assert 5 < drafts.accepted < drafts.drafted


@pytest.mark.parametrize("arch", [DENSE, MIXTURE])
def test_logits_are_the_same_bits(head_file: HeadFile, arch: str) -> None:
    """Those of a prompt, of every token: the last layer computes all of them where a head follows."""
    logits = []
    for draft in ("off", "mtp"):
        with opened(head_file(arch), draft, logits_all=True) as llm:
            llm.eval(PROMPT)
            llm.eval([5])
            logits.append(np.array(llm.scores[: len(PROMPT) + 1]))
    assert np.ptp(logits[0]) > 1 and np.array_equal(*(each.view(np.uint32) for each in logits))


def head_at_once(llm: Model, text: list[int], n: int) -> list[int]:
    """Guesses of a context of its own: each token with the state before it, as the engine's own driver does it."""
    llm.eval(text[:-1])
    width = llama_cpp.llama_model_n_embd_out(llm._model.model)
    states = np.ctypeslib.as_array(ext.llama_get_embeddings_nextn(llm.ctx), (len(text) - 1, width))
    rows = np.zeros((len(text) + n, width), np.float32)
    rows[1 : len(text)] = states
    params = mtp_params(llm.context_params)
    params.n_batch = params.n_ubatch = params.n_outputs_max = len(text) + n
    context = new_context(llm.model_path, llm._model.model, params)
    ext.llama_set_embeddings_nextn(context, True, True)
    batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
    said: list[int] = []
    at, tokens = 0, text
    while len(said) < n:
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, at + i, 1, 0
            batch.logits[i] = True
        batch.n_tokens, batch.embd = len(tokens), rows[at:].ctypes.data_as(type(batch.embd))
        assert llama_cpp.llama_decode(context, batch) == 0
        at += len(tokens)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (llm.n_vocab(),))
        rows[at] = np.ctypeslib.as_array(ext.llama_get_embeddings_nextn_ith(context, -1), (width,))
        said.append(int(logits.argmax()))
        tokens = said[-1:]
    batch.embd = None
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return said


@pytest.mark.parametrize("arch", [DENSE, MIXTURE])
@pytest.mark.parametrize("n_prompt", [97, 300])
def test_guesses_are_those_of_a_head_that_has_seen_the_text_at_once(
    head_file: HeadFile, arch: str, n_prompt: int
) -> None:
    """Whatever it guessed before, and however often the text went back: each state is that of the text as it is."""
    path = head_file(arch, added=1.0, mixed=True)
    prompt = (PROMPT * 4)[:n_prompt]

    def guesses(llm: Model, text: list[int]) -> list[int]:
        head = llm.flash._load.head
        head.follow(0, np.array(text, np.intc))
        return [token for token, _ in islice(head.guesses(0), 4)]

    batch = {"n_batch": 512, "n_ubatch": 512}
    with opened(path, "mtp", "none", **batch) as at_once, opened(path, "mtp") as llm:
        always_drafting(llm, 6)
        said = tokens_of(llm, 40, prompt, temp=0.0)
        assert llm.flash.stats().drafts.drafted > 60
        text = prompt + said
        for last in (text[-1], (text[-1] + 1) % 500):  # a guess depends on the last token, too
            text[-1] = last
            at_once.reset()
            expected = head_at_once(at_once, text, 4)
            assert guesses(llm, text) == expected and len(set(expected)) > 1


def test_a_state_from_elsewhere_ends_drafts_and_no_answer(head_file: HeadFile) -> None:
    """A saved state has no states of the last layer: the head begins anew behind it."""
    path = head_file(MIXTURE)
    with opened(path, "off") as plain, opened(path, "mtp") as llm:
        always_drafting(llm, 4)
        for each in (plain, llm):
            each.eval(PROMPT)
        state = plain.save_state()
        said = []
        for each in (plain, llm):
            each.eval(PROMPT[::-1] * 2)
            each.load_state(state)
            said.append(tokens_of(each, 60, [*PROMPT, 11, 12], temp=0.0))
        assert said[0] == said[1]
        assert llm.flash.stats().drafts.accepted > 5


def test_a_file_without_a_head_is_refused_with_its_name(head_file: HeadFile) -> None:
    path = head_file(MIXTURE, head=False)
    with pytest.raises(FlashError, match=rf"{path.name} has no head of multi-token prediction.*draft='ngram'"):
        opened(path, "mtp")
    with opened(path, "auto") as llm:
        assert llm.flash.stats().drafts.source == "ngram"


def test_auto_takes_the_head(head_file: HeadFile) -> None:
    path = head_file(MIXTURE)
    with opened(path, "auto") as llm:
        tokens_of(llm, 20, temp=0.0)
        drafts = llm.flash.stats().drafts
        assert drafts.source == "mtp" and drafts.passes > 0
    with opened(path, "auto", flash_attn=True) as llm:
        drafts = llm.flash.stats().drafts
        assert drafts.source == "off" and "flash_attn" in drafts.reason and llm.flash.memory.draft == 0


def test_a_head_whose_graph_the_engine_cannot_compute_is_not_used(head_file: HeadFile) -> None:
    path = head_file(MIXTURE, sections=True)
    assert mtp_head(read_gguf(path)) is None
    with opened(path, "auto") as llm:
        tokens_of(llm, 10, temp=0.0)
        assert llm.flash.stats().drafts.source == "ngram"
    with pytest.raises(FlashError, match="no head of multi-token prediction"):
        opened(path, "mtp")


def test_without_drafts_a_head_takes_no_memory(head_file: HeadFile) -> None:
    """It is in the file, and neither read nor planned for; with them, it counts, and no guess reads from flash."""
    path = head_file(MIXTURE)
    meta = read_gguf(path)
    head = mtp_head(meta)
    assert head is not None and head.bytes > 500_000
    weights = sum(tensor.size for tensor in meta.tensors.values())
    with opened(path, "off", "none") as plain, opened(path, "mtp", "none") as llm:
        assert plain.flash.memory.weights < 1.01 * (weights - head.bytes)
        assert plain.flash.memory.draft == 0 and plain.flash.plan.resident_bytes == weights - head.bytes
        assert llm.flash.memory.weights == plain.flash.memory.weights
        assert llm.flash.memory.draft == head.bytes + llm.flash._load.head.beside
    with opened(path, "mtp") as llm:
        always_drafting(llm, 4)
        names = {tensor.name for tensor in llm.flash.plan.tensors}
        assert "output.weight" not in names and not names & {tensor.name for tensor in head.tensors}
        text = [*PROMPT, *tokens_of(llm, 5, temp=0.0)]
        before = llm.flash.stats().total.bytes_read
        assert llm.flash._load.head.follow(0, np.array(text, np.intc)) > 0
        list(islice(llm.flash._load.head.guesses(0), 5))
        read = llm.flash.native.stats().bytes_read - before
        assert read < 6 * 512 * 40, "rows of the embedding"


@pytest.mark.parametrize("what", ["all", "none"])
def test_a_session_that_is_closed_while_tokens_are_drafted_drafts_no_more(head_file: HeadFile, what: str) -> None:
    path = head_file(MIXTURE)
    with opened(path, "off", what) as plain, opened(path, "mtp", what) as llm:
        always_drafting(llm, 4)
        tokens = llm.generate(PROMPT, temp=0.0)
        said = list(islice(tokens, 20))
        llm.flash.close()
        drafted = llm.flash.stats().drafts.drafted
        assert drafted > 0 and said + list(islice(tokens, 20)) == tokens_of(plain, 40, temp=0.0)
        assert llm.flash.drafter(np.array(PROMPT, np.intc)).size == 0


@pytest.mark.parametrize("draft", ["mtp", "auto", "ngram"])
def test_where_passes_have_one_token_no_head_is_loaded(head_file: HeadFile, draft: str) -> None:
    path = head_file(MIXTURE)
    with opened(path, draft, n_ubatch=1) as llm:
        assert llm.flash.drafter is None and llm.flash._load.head is None and llm.flash.memory.draft == 0
        assert "one token" in llm.flash.stats().drafts.reason
        assert len(tokens_of(llm, 5, temp=0.0)) == 5
    made = llama_flash.plan(path, "8GiB", n_ctx=512, n_ubatch=1, flash_offload={"draft": draft})
    assert made.drafts is None and made.memory.draft == 0


@pytest.mark.parametrize("arch", ["hy_v3", DENSE, "step35"])
def test_of_several_heads_the_first_one_makes_all_guesses(head_file: HeadFile, arch: str) -> None:
    """They count in the budget, as the engine loads all."""
    one, path = mtp_head(read_gguf(head_file(arch))), head_file(arch, heads=3)
    head = mtp_head(read_gguf(path))
    assert one is not None and head is not None and head.n_layers == 3 and head.bytes > 2.9 * one.bytes
    with opened(path, "off", "none") as plain, opened(path, "mtp", "none") as llm:
        always_drafting(llm, 5)
        assert answers(llm) == answers(plain)
        drafts = llm.flash.stats().drafts
        assert drafts.source == "mtp" and 10 < drafts.accepted < drafts.drafted - 10
        assert llm.flash.memory.draft >= head.bytes


def test_several_heads_for_which_the_engine_has_no_graph_are_not_used(head_file: HeadFile) -> None:
    path = head_file(MIXTURE, heads=2)
    with pytest.raises(FlashError, match=rf"{path.name} has no head of multi-token prediction that the engine can"):
        opened(path, "mtp")
    with opened(path, "auto") as llm, opened(path, "off") as plain:
        assert llm.flash.stats().drafts.source == "ngram" and llm.flash.memory.draft == 0
        assert tokens_of(llm, 20, temp=0.0) == tokens_of(plain, 20, temp=0.0)


def test_a_head_that_fails_ends_the_drafts_and_no_answer(head_file: HeadFile) -> None:
    path = head_file(MIXTURE)
    with opened(path, "off") as plain, opened(path, "mtp") as llm:
        always_drafting(llm, 4)
        tokens = llm.generate(PROMPT, temp=0.0)
        said = list(islice(tokens, 20))
        assert llm.flash.stats().drafts.drafted > 0
        stop = llama_cpp.ggml_abort_callback(lambda _: True)
        llama_cpp.llama_set_abort_callback(llm.flash._load.head._context, stop, None)
        assert said + list(islice(tokens, 30)) == tokens_of(plain, 50, temp=0.0)
        drafts = llm.flash.stats().drafts
        assert path.name in drafts.reason and "head could not compute" in drafts.reason
        assert tokens_of(llm, 20, temp=0.0) == said
        assert llm.flash.stats().drafts.drafted == drafts.drafted


def test_while_drafts_do_not_pay_a_head_computes_nothing(head_file: HeadFile) -> None:
    """What has no room to wait is forgotten, and the text begins anew there; the head sees it once drafts may pay."""
    path = head_file(MIXTURE, mixed=True)
    with opened(path, "mtp") as llm:
        assert llm.flash is not None and llm.flash.drafter is not None
        head, length = llm.flash._load.head, llm.flash.drafter._length
        length._credit = -1e9
        tokens = llm.generate(PROMPT, temp=0.0)
        said = list(islice(tokens, 300))
        assert head._n_computed == 0 and head._texts[0].held == [] and 0 < len(head._texts[0].waiting) <= head._n_batch
        text = np.array([*PROMPT, *said], np.intc)
        assert head.follow(0, text) == (len(text) - 1 - head._texts[0].begin) + 1
        assert len(list(islice(head.guesses(0), 3))) == 3


def test_beside_a_draft_model_of_upstream_s_no_head_is_loaded(head_file: HeadFile) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    path = head_file(MIXTURE)
    with opened(path, "mtp", draft_model=LlamaPromptLookupDecoding()) as llm:
        assert llm.flash.drafter is None and llm.flash._load.head is None and llm.flash.memory.draft == 0
        assert len(tokens_of(llm, 10, temp=0.0)) == 10
