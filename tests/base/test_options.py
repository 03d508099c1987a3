"""Sizes and options: what is accepted, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_flash import FlashOffload
from llama_flash.options import reject_misspelt
from llama_flash.sizes import ACCEPTED, format_size, parse_size

UNITS = {"": 1, "B": 1, "K": 2**10, "KiB": 2**10, "MiB": 2**20, "M": 2**20, "GiB": 2**30, "G": 2**30, "TiB": 2**40}
UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30),
        ("2 GiB", 2 << 30),
        ("1.5G", 3 << 29),
        ("800MB", 800_000_000),
        ("2147483648", 2 << 30),
        (2147483648, 2 << 30),
        (4096.0, 4096),
        (".5g", 1 << 29),
        ("9007199254740993", 9007199254740993),  # not representable as a float
    ],
)
def test_sizes_are_read_as_people_write_them(text: int | float | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "bad",
    [
        *(0, -1, 0.5, math.nan, math.inf, -math.inf, 1e300, True, False),
        *("", " ", "-1", "0", "0.1", "5 parsecs", "", "GiB", "1e3", "nan", "inf", "٣GiB", "1²", "1.2.3G"),
        *("9" * 40, "9" * 9999, "9" * 9999 + ".0"),
    ],
)
def test_bad_sizes_are_refused_with_the_accepted_forms(bad: object) -> None:
    with pytest.raises(ValueError, match="accepted") as error:
        parse_size(bad)  # type: ignore[arg-type]
    assert ACCEPTED in str(error.value)


@pytest.mark.parametrize("bad", [None, b"2GiB", [1], {}, 2j, object])
def test_what_is_neither_number_nor_text_is_a_type_error_with_the_accepted_forms(bad: object) -> None:
    with pytest.raises(TypeError, match="accepted") as error:
        parse_size(bad)  # type: ignore[arg-type]
    assert ACCEPTED in str(error.value)
    for option in ("dram_budget", "panel_bytes", "reserve"):
        if (option, bad) != ("reserve", None):
            with pytest.raises(TypeError, match=f"{option}: .*accepted"):
                FlashOffload(**{option: bad})  # type: ignore[arg-type]


def test_a_share_needs_something_to_be_a_share_of() -> None:
    assert parse_size("50%", reference=1000) == 500
    assert parse_size("12.5 %", reference=1000) == 125
    with pytest.raises(ValueError, match="share"):
        parse_size("50%")


@given(st.integers(1, 1 << 40), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]), st.booleans())
def test_whole_numbers_of_any_unit_are_exact(number: int, unit: str, space: str, lower: bool) -> None:
    text = f"{number}{space}{unit}"
    size = number * UNITS[unit]
    if size < 1 << 63:
        assert parse_size(text.lower() if lower else text) == size
    else:
        with pytest.raises(ValueError, match="accepted"):
            parse_size(text)


@given(st.text())
def test_any_text_is_a_positive_size_or_a_value_error(text: str) -> None:
    try:
        size = parse_size(text, reference=1 << 30)
    except ValueError:
        return
    assert 1 <= size < 1 << 63


@given(st.integers(1, (1 << 62)))
def test_what_is_printed_is_within_one_percent_when_read_again(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= max(1, size * 0.01)


def test_unknown_options_raise_type_error() -> None:
    with pytest.raises(TypeError):
        FlashOffload(dram_bugdet="2GiB")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        FlashOffload.coerce({"budget": "2GiB"})
    with pytest.raises(TypeError, match="FlashOffload"):
        FlashOffload.coerce("2GiB")  # type: ignore[arg-type]


def test_true_means_defaults_and_false_means_off() -> None:
    assert FlashOffload.coerce(True) == FlashOffload()
    assert FlashOffload.coerce(False) is None
    assert FlashOffload.coerce(None) is None
    assert FlashOffload.coerce({"dram_budget": "2GiB"}) == FlashOffload(dram_budget="2GiB")
    options = FlashOffload(io_engine="pread")
    assert FlashOffload.coerce(options) is options


@pytest.mark.parametrize(
    "bad",
    ["-1", -1, "5 parsecs", 0, "0", "0%", "-50%", "%", math.nan, math.inf, -math.inf, True, False, "", "automatic"],
)
def test_bad_budgets_are_refused_when_they_are_written(bad: object) -> None:
    with pytest.raises(ValueError, match=r'dram_budget: .*2GiB.*"auto"'):
        FlashOffload(dram_budget=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option",
    [
        {"what": "neurons"},
        {"predictor": "guess"},
        {"predictor": None},
        {"window": -1},
        {"window": True},
        {"window": 2.5},
        {"window": "5"},
        {"window": 1 << 21},
        {"lookahead": "yes"},
        {"lookahead": None},
        {"io_engine": "aio"},
        {"io_depth": 0},
        {"io_depth": True},
        {"io_threads": 1000},
        {"panel_bytes": "1K"},
        {"panel_bytes": "50%"},
        {"reserve": "-1"},
        {"reserve": True},
        {"reserve": False},
        {"reserve": ""},
        {"reserve": math.nan},
        {"reserve": "10%"},
        {"prompt_cache": ""},
        {"prompt_cache": 1.5},
        {"prompt_cache_size": "1KiB"},
        {"prompt_cache_size": "lots"},
    ],
)
def test_bad_values_name_the_option(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        FlashOffload(**option)  # type: ignore[arg-type]


def test_neurons_are_found_and_kept_as_there_is_room_unless_told_otherwise() -> None:
    assert (FlashOffload().predictor, FlashOffload().window, FlashOffload().lookahead) == ("auto", None, "auto")
    for predictor in ("auto", "exact", "lowrank", "off"):
        for window in (None, 0, 5, 1 << 20):
            for lookahead in ("auto", True, False):
                chosen = {"predictor": predictor, "window": window, "lookahead": lookahead}
                options = FlashOffload.coerce(chosen)
                assert options == FlashOffload(**chosen)  # type: ignore[arg-type]


def test_options_are_frozen_and_pickle() -> None:
    options = FlashOffload(dram_budget="2GiB", what="experts")
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.what = "all"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["flash_ofload", "flashoffload", "flash_offloading", "flash_budget", "flash_window"])
def test_misspelt_flash_options_of_llama_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        reject_misspelt([name])


def test_other_unknown_arguments_of_llama_pass() -> None:
    reject_misspelt(["n_gqa", "f16_kv", "offload_everything", "low_vram"])
