"""What all commands of `llama-flash` have in common: names, help, JSON, errors, progress, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import typer
from commands import FLASH, Flash, flash, in_this_process
from conftest import ModelFile
from neurons import bundled
from repository import ROOT
from sparse_models import library_text
from terminal import Terminal

from gguf_tools.synthetic import tiny, write
from llama_flash.cli import EXIT_CODES, app, common
from llama_flash.cli.again import command_line
from llama_flash.cli.later import Later
from llama_flash.model.shape import KV_TYPES

GROUP: Any = typer.main.get_command(app)
CONTEXT = GROUP.make_context("llama-flash", [], resilient_parsing=True)
COMMANDS = {name: GROUP.get_command(CONTEXT, name) for name in GROUP.list_commands(CONTEXT)}


def real(name: str) -> Any:
    """The command itself."""
    command = COMMANDS[name]
    return command.load() if isinstance(command, Later) else command


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Flash:
    return in_this_process(capsys, monkeypatch)


def one_object(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)  # fails if there is anything else
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_and_json(name: str) -> None:
    command = real(name)
    assert "Examples:" in command.epilog and f"llama-flash {name}" in command.epilog
    speaks = ("serve", "exec", "worker")  # servers answer in JSON, a tool as it does
    assert name in speaks or any("--json" in param.opts for param in command.params)
    if isinstance(COMMANDS[name], Later):
        assert COMMANDS[name].help == command.help.split("\n\n")[0].replace("\n", " "), "the list says what --help says"


def test_the_same_thing_has_the_same_name() -> None:
    names = {
        "n_ctx": {"-c", "--n-ctx", "--ctx"},
        "threads": {"-t", "--threads"},
        "as_json": {"--json"},
        "force": {"--force"},
        "memory": {"--memory"},
        "dram_budget": {"--dram-budget"},
        "prompt": {"-p", "--prompt"},
        "n_tokens": {"-n", "--tokens"},
        "io_engine": {"--io-engine"},
    }
    seen = set()
    for command in COMMANDS:
        for param in real(command).params:
            if param.name in names:
                assert set(param.opts) == names[param.name], (command, param.name)
                seen.add(param.name)
            else:
                for option, known in names.items():
                    if command not in ("calibrate", "reorder") or option != "n_tokens":  # there, of a text that is read
                        assert not known & set(param.opts), (command, param.name)
    assert seen == set(names)
    assert set(common._KV_TYPES) == set(KV_TYPES)


def test_run_has_every_option_of_a_load_that_plan_has() -> None:
    def options(name: str) -> set[str]:
        return {option for param in real(name).params for option in (*param.opts, *param.secondary_opts)}

    for name in ("run", "chat"):
        assert options("plan") - options(name) == {"--logits-all", "--parallel"}


def test_the_list_of_commands_needs_none_of_them() -> None:
    script = (
        "import sys; from llama_flash.cli import main; sys.argv = ['llama-flash', '--help']\n"
        "try: main()\n"
        "finally: print([m for m in ('numpy', 'gguf', 'llama_cpp', 'jinja2') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400)
    assert result.stderr.strip() == "[]"
    for name in COMMANDS:
        assert f" {name} " in result.stdout
    said = " ".join(result.stdout.split())
    assert all(f"{code} {when}" in said for code, when in EXIT_CODES.items())


def test_the_reference_has_every_command_and_option() -> None:
    check = subprocess.run(
        [sys.executable, ROOT / "ci/tools/generate_cli_reference.py", "--check"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert check.returncode == 0, check.stderr
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for param in real(name).params:
            if param.param_type_name == "option" and not param.hidden:
                assert any(f"`{option}`" in section for option in param.opts), (name, param.opts)


def test_a_command_line_can_be_repeated_with_changes() -> None:
    words = ["m.gguf", "-p", "-x", "--no-lookahead", "--window", "3", "--cap", "50%", "-c", "7"]
    context = real("run").make_context("run", list(words))
    command = command_line(context, cap=None, window=None)[3:]
    again = real("run").make_context("run", command[1:])
    assert {**context.params, "cap": None, "window": None} == again.params
    assert command[0] == "run" and again.params["prompt"] == "-x" and again.params["lookahead"] is False


# ---- model files


def test_model_files_go_through_all_tools_with_one_object_each(here: Flash, tmp_path: Path) -> None:
    folder = checkpoints.opt().write(tmp_path / "checkpoint")
    flash_file, ordinary = tmp_path / "flash.gguf", tmp_path / "ordinary.gguf"
    made = one_object(here("convert", folder, flash_file, "--type", "f32", "--json"))
    assert made["file"] == str(flash_file) and made["bytes"] == flash_file.stat().st_size
    assert made["bundles"]["activation"] == "relu" and made["bundles"]["record_bytes"] > 0
    plain = one_object(here("convert", folder, tmp_path / "plain.gguf", "--no-bundle", "--type", "f32", "--json"))
    assert plain["bundles"] is None and plain["activation"] == "relu"
    unbundled = one_object(here("unbundle", flash_file, ordinary, "--memory", "64", "--json"))
    assert unbundled == {"file": str(ordinary), "bytes": ordinary.stat().st_size}
    again = one_object(here("bundle", ordinary, tmp_path / "again.gguf", "--memory", "64MiB", "--json"))
    assert again["parts"] == made["bundles"]["parts"] and again["layers"] == made["bundles"]["layers"]
    assert one_object(here("verify", flash_file, ordinary, "--json"))["same"] is True
    listing = one_object(here("inspect", flash_file, "--json"))
    assert listing["flash"]["record_bytes"] == made["bundles"]["record_bytes"]


def test_predictors_and_orders_say_what_they_found_as_one_object(
    here: Flash, model_folder: Path, tmp_path: Path
) -> None:
    (plain,) = write(tiny("arcee", "F32", n_layer=1), model_folder / "commands-arcee.gguf")
    model, text = bundled(plain), library_text(model_folder)[0]
    out, work = tmp_path / "predictors.gguf", tmp_path / "work"
    few = ("--text", text, "--tokens", 4096, "-t", 1, "--json")
    found = one_object(here("calibrate", model, out, *few, "--max-rank", 32, "--no-refine", "--work", work))
    assert [layer["rank"] for layer in found["layers"]] == [32]
    ordered = tmp_path / "ordered.gguf"
    reads = one_object(here("reorder", model, ordered, "--activations", work, "--json"))
    assert reads["file"] == str(ordered) and len(reads["layers"]) == 1
    assert one_object(here("verify", model, ordered, "--json"))["same"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "/no/model.gguf"), "No such file"),
        (("bundle", "MODEL", "OUT", "--memory", "much"), "--memory: not a size: 'much'"),
        (("bundle", "MODEL", "OUT", "--memory", "0"), "--memory: not a size: '0'"),
        (("bundle", "MODEL", "OUT", "--type", "q9"), "unknown type 'q9'"),
        (("unbundle", "MODEL", "OUT"), "has no bundles"),
        (("convert", "/no/where", "OUT"), "/no/where"),
        (("calibrate", "MODEL"), "--text FILE is needed"),
        (("run", "MODEL", "--what", "most"), "what: 'most' is not one of"),
        (("run", "MODEL", "--reserve", "some"), "reserve: not a size: 'some'"),
        (("chat", "MODEL", "--type-v", "q9"), "--type-v: 'q9' is not one of"),
        (("bench", "MODEL", "--dram-budget", "much"), "not a size: 'much'"),
        (("trace", "MODEL", "-p", "x", "-o", "/no/where/trace"), "/no/where/trace cannot be written: No such file"),
        (("trace", "MODEL", "-o", "OUT", "--text", "/no/text"), "/no/text"),
        (("doctor", "/no/where"), "no such file or folder: /no/where"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    here: Flash, model_file: ModelFile, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    names = {"MODEL": str(model_file("arcee")), "OUT": str(tmp_path / "out.gguf")}
    result = here(*(names.get(one, one) for one in arguments))
    assert (result.returncode, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("llama-flash: ") and said in lines[0]
    assert not list(tmp_path.iterdir())


def test_progress_is_a_bar_with_rate_and_remaining_time_on_a_terminal(model_file: ModelFile, tmp_path: Path) -> None:
    model = model_file("arcee", "F16")
    with Terminal([*FLASH, "bundle", model, tmp_path / "b.gguf"], width=110) as terminal:
        assert terminal.end() == 0
    assert f"bundling {model.name} ━" in terminal.text
    assert "B/s" in terminal.text and "0:00:" in terminal.text
    result = flash("bundle", model, tmp_path / "c.gguf")
    assert result.stderr == "", "nothing that took less than ten seconds"


# ---- cap, top, run


def test_cap_says_what_became_of_the_command_as_one_object() -> None:
    result = flash("cap", "64MiB", "--json", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    found = json.loads(result.stdout)
    assert result.returncode == found["exit_code"] == 3
    assert (found["stdout"], found["stderr"], found["oom_kills"]) == ("out\n", "err\n", 0)
    assert 0 < found["peak_bytes"] <= found["limit_bytes"] == 64 << 20


def test_top_is_one_object_too(tmp_path: Path) -> None:
    assert one_object(flash("top", "--json", LLAMA_FLASH_RUNTIME=str(tmp_path / "none"))) == {"processes": []}


def test_run_as_stock_says_the_same(model_file: ModelFile) -> None:
    model = model_file("qwen3moe")
    common = ("run", model, "-p", "hello", "-n", 24, "--temp", 0, "--json", "--ignore-eos")
    stock, offload = one_object(flash(*common, "--no-flash")), one_object(flash(*common, "--what", "experts"))
    assert stock["flash"] is None and offload["flash"]["mode"] == "flash"
    assert stock["text"] == offload["text"] != ""
    assert offload["flash"]["decode"]["tokens"] >= 23, "no end of text"
    assert stock["tokens_per_second"] > 0


def test_names_with_brackets_are_told_as_they_are(here: Flash, model_file: ModelFile, tmp_path: Path) -> None:
    model = tmp_path / "m[bold]o[1].gguf"
    model.symlink_to(model_file("qwen3moe"))
    assert f"{model.name}:" in here("plan", model).stdout
    trace = tmp_path / "t[red].npz"
    assert f"{trace}: " in flash("trace", model, "-p", "a", "-n", 2, "-o", trace).stdout
    assert f"{model.name}: " in flash("simulate", trace).stdout


def test_options_of_a_load_reach_it(model_file: ModelFile) -> None:
    options = ("--reserve", "0", "--io-engine", "pread", "--what", "all", "--no-follow", "--n-ctx", 300)
    free = ("run", model_file("qwen3moe"), "-p", "hello", "-n", 2, "--json", "--type-k", "q8_0", "--n-batch", 64)
    found = one_object(flash(*free, *options))["flash"]
    assert found["memory"]["reserve"] == 0 and found["io_engine"] == "pread"
    f16 = one_object(flash("run", model_file("qwen3moe"), "-p", "hello", "-n", 2, "--json", *options))["flash"]
    assert found["memory"]["kv"] < f16["memory"]["kv"]


# ---- completion


def complete(line: str) -> list[str]:
    words = line.split(" ")
    environment = {
        "_LLAMA_FLASH_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    program = Path(sys.executable).with_name("llama-flash")
    result = subprocess.run(
        [program], capture_output=True, text=True, timeout=400, env={**os.environ, **environment}, check=True
    )
    return result.stdout.split()


def test_the_shell_completes_commands_options_and_values() -> None:
    assert complete("llama-flash b") == ["batch", "bench", "bundle"]
    assert complete("llama-flash convert --ty") == ["--type"]
    assert complete("llama-flash run --predictor e") == ["exact"]
    assert "--dram-budget" in complete("llama-flash chat --d")


def test_the_completion_script_is_bashs(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("llama-flash")
    script = subprocess.run(
        ["bash", "-c", f"{program} --show-completion bash; true"],
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    ).stdout
    assert "complete -o default -F _llama_flash_completion llama-flash" in script
    file = tmp_path / "completion.bash"
    file.write_text(script)
    asked = f"PATH={program.parent}:$PATH; . {file}; COMP_WORDS=(llama-flash un); COMP_CWORD=1; "
    asked += '_llama_flash_completion llama-flash; echo "${COMPREPLY[@]}"'
    said = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=400, check=True).stdout
    assert said.split() == ["unbundle"]
