"""What `llama-flash serve` reads from flags, a settings file and the environment, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import llama_flash
from llama_flash import FlashOffload
from llama_flash.budget.rooms import held_by_process
from llama_flash.model.gguf import read_gguf
from llama_flash.model.shape import ContextShape
from llama_flash.server.engine_settings import EngineSettings, read_engine_settings
from llama_flash.server.limits import Limits
from llama_flash.server.parallel import choose_parallel
from llama_flash.server.values import ENV_PREFIX

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(SHIPPED, tmp_path))


def settings_file(folder: Path, model: Path, form: str, server: dict[str, Any], **settings: Any) -> Path:
    import yaml

    content = {**server, "models": [{"model": str(model), **settings}]}
    file = folder / f"settings.{form}"
    file.write_text(json.dumps(content) if form == "json" else yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_flags_come_before_the_file_and_the_file_before_the_environment(
    form: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = {"window": 4, "predictor": "off"}
    file = settings_file(tmp_path, model, form, {"port": 2}, n_batch=64, flash_offload=flash)
    environment = {"PORT": "3", "API_KEY": "12", "N_BATCH": "32", "N_CTX": "99", "SEED": "7", "VERBOSE": "true"}
    environment |= {"FLASH_OFFLOAD__WINDOW": "1", "FLASH_OFFLOAD__IO_DEPTH": "9", "CHAT_TEMPLATE_KWARGS": '{"a": 1}'}
    for name, value in environment.items():
        monkeypatch.setenv(f"{ENV_PREFIX}{name}", value)
    found = read_engine_settings(file, {"n_ctx": 55, "flash_offload": {"predictor": "exact"}})
    assert found == EngineSettings(
        model,
        port=2,
        api_key="12",
        n_batch=64,
        n_ctx=55,
        seed=7,
        verbose=True,
        chat_template_kwargs={"a": 1},
        flash_offload={"window": 4, "predictor": "exact", "io_depth": 9},
    )


def test_prompts_on_flash_are_options_of_flash(model: Path, tmp_path: Path) -> None:
    found = read_engine_settings(None, {"model": str(model), "prompt_cache": True, "prompt_cache_size": "1GiB"})
    assert found.keeps_prompts and found.flash_offload == {"prompt_cache": True, "prompt_cache_size": 1 << 30}
    found = read_engine_settings(
        None, {"model": str(model), "prompt_cache": str(tmp_path), "flash_offload": {"what": "experts"}}
    )
    assert found.flash_offload == {"what": "experts", "prompt_cache": str(tmp_path)}
    assert not read_engine_settings(None, {"model": str(model)}).keeps_prompts
    with pytest.raises(ValueError, match="prompt_cache: is a part of flash_offload, which is false"):
        read_engine_settings(None, {"model": str(model), "prompt_cache": True, "flash_offload": False})


def test_every_option_of_flash_can_be_said_in_the_file_and_in_the_environment(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {
        "dram_budget": "1GiB",
        "reserve": "40MiB",
        "what": "experts",
        "predictor": "off",
        "window": 3,
        "lookahead": False,
        "draft": "ngram",
        "follow": False,
        "warm_start": False,
        "io_engine": "pread",
        "io_depth": 8,
        "io_threads": 2,
        "panel_bytes": "1MiB",
        "prompt_cache": "prompts",
        "prompt_cache_size": "2GiB",
    }
    of_workers = {"workers": "127.0.0.1:50052,host-b:50052", "worker_token_file": "token", "worker_timeout": 2.5}
    assert set(values) == {option.name for option in fields(FlashOffload)} - set(of_workers)
    file = settings_file(tmp_path, model, "json", {}, flash_offload=of_workers)
    assert read_engine_settings(file, {}).flash_offload == of_workers
    with monkeypatch.context() as set_here:
        for name, value in of_workers.items():
            set_here.setenv(f"{ENV_PREFIX}FLASH_OFFLOAD__{name.upper()}", str(value))
        assert read_engine_settings(None, {"model": str(model)}).flash_offload == of_workers
    with pytest.raises(ValueError, match="prompts lies at the workers"):
        file = settings_file(tmp_path, model, "json", {}, flash_offload={**of_workers, "prompt_cache": True})
        read_engine_settings(file, {})
    assert (
        read_engine_settings(settings_file(tmp_path, model, "json", {}, flash_offload=values), {}).flash_offload
        == values
    )
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        monkeypatch.setenv(f"{ENV_PREFIX}FLASH_OFFLOAD__{name.upper()}", text)
    assert read_engine_settings(None, {"model": str(model)}).flash_offload == values


def test_a_classic_file_means_the_same(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    adapter.touch()
    file = settings_file(
        *(tmp_path, model, "yaml", {"host": "::1", "port": 0, "interrupt_requests": False}),
        model_alias="a",
        n_threads=1,
        n_threads_batch=2,
        type_k=8,
        embedding=True,
        lora_path=str(adapter),
        flash_attn=False,
        use_mlock=False,
        flash_offload=False,
    )
    assert read_engine_settings(file, {}) == EngineSettings(
        *(model, "a", "::1", 0),
        threads=1,
        threads_batch=2,
        type_k="q8_0",
        embeddings=True,
        lora=(adapter, 1.0),
        flash_offload=False,
    )


def test_the_shipped_model_is_served_where_none_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_engine_settings(None, {}, model).model == model
    monkeypatch.setenv(f"{ENV_PREFIX}MODEL", "none.gguf")
    with pytest.raises(FileNotFoundError, match=r"no such model: none\.gguf"):
        read_engine_settings(None, {}, model)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rope_freq_base", 1.0, r"there is no such setting here; there are model, .*`llama-flash serve --classic`"),
        ("n_ctxx", 1, r"n_ctxx: there is no such setting here"),
        ("flash_attn", True, r"flash_attn: True cannot be had here, it is false; `llama-flash serve --classic` has it"),
        ("cache", True, r"cache: True cannot be had"),
        ("n_ctx", 0, r"n_ctx: 0 is not a whole number from 1"),
        ("n_ctx", True, r"n_ctx: True is not a whole number"),
        ("parallel", "two", r"parallel: 'two' is not a whole number"),
        ("verbose", "perhaps", r"verbose: 'perhaps' is neither true nor false"),
        ("type_k", "q9", r"type_k: 'q9' is not one of f32, f16"),
        ("type_v", "q8_0", r"type_v: a V cache of q8_0 needs the flash kernel of attention"),
        ("pooling", "mean", r"--pooling: is of embeddings: add --embeddings"),
        ("pooling", "max", r"pooling: 'max' is not one of none, mean"),
        ("lora", "none.gguf:0.5", r"lora: no such adapter: none\.gguf"),
        ("prompt_cache_ram", "much", r"prompt_cache_ram: not a size: 'much'"),
        ("prompt_cache", "1GiB", r"prompt_cache: '1GiB' is a size: prompts kept in memory are prompt_cache_ram"),
        ("chat_template_file", "none.jinja", r"chat_template_file: none\.jinja: No such file"),
        ("api_key", "", r"an empty key would let everybody in"),
        ("flash_offload", {"windwo": 1}, r"flash_offload: there is no option windwo; there are dram_budget"),
        ("flash_offload", {"window": -1}, r"flash_offload: window: -1"),
    ],
)
def test_a_setting_that_makes_no_sense_here_is_named(
    name: str, value: Any, said: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        read_engine_settings(settings_file(tmp_path, model, "json", {}, **{name: value}), {})


def test_a_variable_that_makes_no_sense_here_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}ROOT_PATH", "/v")
    with pytest.raises(ValueError, match=rf"{ENV_PREFIX}ROOT_PATH: .*--classic"):
        read_engine_settings(None, {}, model)


def test_several_models_are_refused_with_what_to_do(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"models": [{"model": str(model)}] * 2}))
    with pytest.raises(
        ValueError, match=r"settings\.json: 2 models; one is served.*start a server for each.*--classic"
    ):
        read_engine_settings(file, {})


def test_sizes_scales_and_templates_are_read(model: Path, tmp_path: Path) -> None:
    adapter, template = tmp_path / "a:b.gguf", tmp_path / "chat.jinja"
    adapter.touch()
    template.write_text("{{ messages[0].content }}")
    flags = {
        "model": str(model),
        "lora": str(adapter),
        "prompt_cache_ram": "1.5MiB",
        "chat_template_file": str(template),
    }
    found = read_engine_settings(None, flags)
    assert found.lora == (adapter, 1.0) and found.prompt_cache_ram == 2 * MIB
    assert found.chat_template == "{{ messages[0].content }}"
    plain = Path(shutil.copy(adapter, tmp_path / "plain.gguf"))
    assert read_engine_settings(None, {"model": str(model), "lora": f"{plain}:0.25"}).lora == (plain, 0.25)
    with pytest.raises(ValueError, match="no colon"):
        read_engine_settings(None, {"model": str(model), "lora": f"{adapter}:0.25"})


def test_as_many_answers_at_once_as_cost_little() -> None:
    meta, one = read_gguf(SHIPPED), ContextShape(n_ctx=1024)

    def chosen(budget: int, n_ctx: int = 1024) -> tuple[int, str]:
        options = FlashOffload(dram_budget=budget, what="experts")
        return choose_parallel(meta, options, ContextShape(n_ctx=n_ctx))

    held = held_by_process()
    wide, tight = chosen(held + 2048 * MIB), chosen(held + 110 * MIB)
    assert wide[0] == 8 and "weights from flash" in wide[1]
    assert 1 <= tight[0] < 8 and tight[1]
    numbers = [chosen(held + mib * MIB)[0] for mib in (100, 140, 200, 400, 800)]
    assert numbers == sorted(numbers), "a larger budget never means fewer"
    assert chosen(held + 400 * MIB, 65536)[0] == 1, "contexts that would take what weights need"
    assert chosen(64 * MIB) == (1, "the budget is small")
    resident = choose_parallel(meta, FlashOffload(dram_budget=held + 2048 * MIB), one)
    assert resident[0] == 8 and "beside the weights" in resident[1]
    assert choose_parallel(meta, None, one)[0] == 4


@pytest.mark.parametrize("n_ctx", [512, 65536])
def test_a_plan_leaves_alone_what_requests_may_take(n_ctx: int, model: Path) -> None:
    planned = llama_flash.plan(model, "8GiB", n_ctx=n_ctx, parallel=2).memory.as_dict()["reserve"]
    assert planned == Limits().of_requests(n_ctx).max_memory + 8 * MIB
