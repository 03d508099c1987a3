"""With drafts the answers are the same bytes: greedy and sampled, whoever guesses, however badly."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from engines import Model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import Llama, LlamaGrammar
from tinydrafts import changed_vocabulary

from llama_flash import FlashError, FlashOffload
from llama_flash.drafts.drafter import Drafter

ARCEE = Path(str(resources.files("llama_flash") / "models/stdlib-arcee-q8_0.gguf"))
PROMPT = "def push(heap, item):\n    heap.append(item)\n\ndef push_all(heap, items):\n"


def opened(path: Any, draft: Any, **options: Any) -> Model:
    """With a part of its weights on flash."""
    logits_all = options.pop("logits_all", False)
    flash = FlashOffload(what="all", draft=draft, panel_bytes=65536, follow=False, warm_start=False)
    llm = Model(
        str(path), n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1, verbose=False, logits_all=logits_all,
        flash_offload=flash, **options,
    )  # fmt: skip
    session = llm.flash
    assert session is not None and session.native is not None
    session.native.set_memory(session.native.requirements().min_memory + (2 << 20))
    return llm


class Guesses:
    """Of a test's choosing: a kind of each, right or wrong."""

    name = "test"
    assumed = (0.9,)

    def __init__(self, said: list[int], right: list[bool], n_vocab: int) -> None:
        self._said, self._right, self._n_vocab = said, right, n_vocab
        self._at = 0

    def follow(self, text: np.ndarray) -> int:
        self._at = len(text)
        return 1

    def guesses(self) -> Iterator[tuple[int, int]]:
        for i in range(self._at, self._at + 40):
            token = self._said[i] if i < len(self._said) else 5
            yield (token if self._right[i % len(self._right)] else (token + 1 + i) % self._n_vocab), 0

    def close(self) -> None:
        pass


def _same(source: Guesses, text: int) -> Guesses:
    return source


@pytest.fixture(scope="module")
def plain() -> Iterator[Model]:
    with opened(ARCEE, "off") as llm:
        yield llm


@pytest.fixture(scope="module")
def drafting() -> Iterator[Model]:
    with opened(ARCEE, "ngram") as llm:
        always_drafting(llm)
        yield llm


def always_drafting(llm: Model, n: int = 7) -> None:
    """Drafts of so many tokens wherever there are guesses, whatever they cost on this machine."""
    assert llm.flash is not None and llm.flash.drafter is not None
    length: Any = llm.flash.drafter._length
    length.begins = lambda *_: True
    length.goes_on = lambda width, *_: width <= n
    length.best = lambda width, expected, chances, spent: min(n, len(chances))


def tokens_of(llm: Llama, n: int, **sampling: Any) -> list[int]:
    said: list[int] = []
    for token in llm.generate(llm.tokenize(PROMPT.encode()), **sampling):
        said.append(token)
        if len(said) == n:
            return said
    raise AssertionError("it ended")


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.lists(st.booleans(), min_size=1, max_size=12),
    st.sampled_from([{"temp": 0.0}, {"temp": 0.9, "top_k": 30}, {"temp": 1.3, "repeat_penalty": 1.2}]),
    st.integers(0, 99),
)
def test_whatever_is_guessed_the_tokens_are_the_same(
    plain: Model, drafting: Model, right: list[bool], sampling: dict[str, Any], seed: int
) -> None:
    answers = []
    prompt = plain.tokenize(PROMPT.encode())
    for llm in (plain, drafting):
        llm.set_seed(seed)
        if llm is drafting:
            assert llm.flash is not None and llm.flash.drafter is not None
            source = Guesses(prompt + answers[0], right, llm.n_vocab())
            drafter = Drafter(partial(_same, source), 256, llm.n_vocab(), lambda n: 1.0)
            llm.flash.drafter, llm.flash.account.drafts = drafter, partial(getattr, drafter, "stats")
            always_drafting(llm)
        answers.append(tokens_of(llm, 32, **sampling))
    assert answers[0] == answers[1] and len(set(answers[0])) > 4
    stats = drafting.flash.drafter.stats
    assert stats.drafted > 0 and (stats.accepted > 0) == any(right)


@pytest.mark.parametrize("draft", ["ngram", ARCEE])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 5}])
def test_texts_are_the_same_and_drafts_were_taken(plain: Model, draft: Any, options: dict[str, Any]) -> None:
    expected = plain(PROMPT, max_tokens=60, **options)["choices"][0]["text"]
    with opened(ARCEE, draft) as llm:
        always_drafting(llm)
        assert llm(PROMPT, max_tokens=60, **options)["choices"][0]["text"] == expected
        stats = llm.flash.stats()
        assert stats.drafts.accepted > 0 and stats.drafts.tokens_per_pass > 1
        assert stats.decode.calls < stats.decode.tokens
        if draft == ARCEE:
            assert stats.memory.draft > ARCEE.stat().st_size
            assert options["temperature"] or stats.drafts.acceptance == 1.0


def test_what_is_asked_for_beside_the_text_is_the_same(plain: Model, drafting: Model) -> None:
    """Grammars, and processors of logits: each is shown the text up to where it samples, and no guesses."""
    grammar = LlamaGrammar.from_string('root ::= ("ab" | "abc" | "x")+', verbose=False)
    shown: dict[int, list[list[int]]] = {}
    answers = []
    for llm in (plain, drafting):
        seen = shown.setdefault(id(llm), [])

        def look(ids: Any, logits: Any, seen: list[list[int]] = seen) -> Any:
            seen.append(ids.tolist())
            return logits

        said = [llm(PROMPT, max_tokens=30, temperature=0.9, seed=2, grammar=grammar)["choices"][0]["text"]]
        said.append(llm(PROMPT, max_tokens=30, temperature=0.0, logits_processor=[look])["choices"][0]["text"])
        answers.append(said)
    assert answers[0] == answers[1]
    assert shown[id(plain)] == shown[id(drafting)]


def test_a_stream_that_is_left_and_the_end_of_the_context_leave_no_trace(plain: Model, drafting: Model) -> None:
    long = PROMPT * 8
    answers = []
    for llm in (plain, drafting):
        stream = llm(PROMPT, max_tokens=60, temperature=0.0, stream=True)
        said = "".join(next(stream)["choices"][0]["text"] for _ in range(9))
        stream.close()
        rests = ((long, None), (PROMPT, 16))
        after = [llm(text, max_tokens=n, temperature=0.0)["choices"][0]["text"] for text, n in rests]
        answers.append((said, after))
    assert answers[0] == answers[1]


def test_logprobs_are_the_same(plain: Model) -> None:
    answers = []
    for draft in ("off", "ngram"):
        with opened(ARCEE, draft, logits_all=True) as llm:
            if draft != "off":
                always_drafting(llm)
            said = llm(PROMPT, max_tokens=40, temperature=0.0, logprobs=3)["choices"][0]
            answers.append((said["text"], said["logprobs"]["token_logprobs"], said["logprobs"]["top_logprobs"]))
    assert answers[0] == answers[1]


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = changed_vocabulary(ARCEE, tmp_path / "other.gguf", token=100)
    with pytest.raises(FlashError, match=r"other\.gguf cannot draft for stdlib-arcee-q8_0\.gguf: token 100 is"):
        opened(ARCEE, other)
    with pytest.raises(FlashError, match=r"draft: .*missing\.gguf: No such file"):
        opened(ARCEE, tmp_path / "missing.gguf")


def test_where_drafts_would_change_the_answer_none_are_made(model_file: ModelFile) -> None:
    with opened(ARCEE, "ngram", flash_attn=True) as llm:
        llm(PROMPT, max_tokens=20, temperature=0.0)
        drafts = llm.flash.stats().drafts
        assert drafts.source == "off" and "flash_attn" in drafts.reason and drafts.passes == 0


def test_a_session_that_is_closed_while_a_model_drafts_for_it_goes_on_without(plain: Model) -> None:
    with opened(ARCEE, ARCEE) as llm:
        always_drafting(llm, 4)
        prompt = llm.tokenize(PROMPT.encode())
        tokens = llm.generate(prompt, temp=0.0)
        said = list(islice(tokens, 12))
        llm.flash.close()
        assert llm.flash.stats().drafts.drafted > 0
        assert said + list(islice(tokens, 12)) == list(islice(plain.generate(prompt, temp=0.0), 24))
        assert llm.flash.drafter(np.array(prompt, np.intc)).size == 0
