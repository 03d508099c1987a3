"""The plugin's arrows point one way: no circle of files, no folder that reaches above itself; and nothing is long."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from plugin_parts import PLUGIN

SRC = PLUGIN / "src"
TOP = "."  # what belongs to the session, and the C interface

# what a folder may include, beside its own files
BELOW: dict[str, set[str]] = {
    "base": set(),
    "memory": {"base"},
    "io": {"base", "memory"},
    "kernels": {"base"},
    "store": {"base", "memory", "io", "kernels"},
    "ops": {"base", "memory", "io", "kernels", "store"},
    "prompts": {"base", "memory", "io"},
    TOP: {"base", "memory", "io", "kernels", "store", "ops"},
    "observe": {"base", "memory", "io", "kernels", "store", "ops", TOP},
    "worker": {"base", "memory", "io", "kernels", "store", "ops", TOP},
}
FILES = sorted(path.relative_to(SRC) for path in SRC.rglob("*") if path.suffix in (".h", ".cpp"))

SOURCES = sorted(path for path in PLUGIN.rglob("*") if path.suffix in (".h", ".cpp"))  # its tests, too
LONGEST_FUNCTION, LONGEST_FILE = 60, 600  # lines
REASON = "// Long: "  # begins the paragraph of a file's head that says why something in it is longer

# of declarations that end with "{"
SCOPE = re.compile(r"(namespace|class|struct|union|enum|extern)\b[^(]*\{")  # what functions may stand in
FUNCTION = re.compile(r".*\)[^=]*\{")  # no list of values
ASIDE = ("#", "}", "public:", "protected:", "private:")  # begins lines that are no part of a declaration


@dataclass(frozen=True)
class Function:
    head: str  # its first line
    line: int
    n_lines: int  # from there to the brace that ends it


def functions(text: str) -> list[Function]:
    """The functions and constructors of code as clang-format writes it, but for those that fit in a line.

    What begins with "{" ends with the next "}" at the indent of the line where its declaration began.
    """
    found: list[Function] = []
    lines = text.splitlines()
    begin, declaration = 0, ""  # of what is in progress
    end = ""  # of its body
    for i, line in enumerate(lines):
        code = line.partition("//")[0].strip()
        if end:
            if not line.startswith(end):
                continue
            if FUNCTION.fullmatch(declaration):
                found.append(Function(lines[begin].strip(), begin + 1, i - begin + 1))
            declaration = end = ""
        elif not code or code.startswith(ASIDE):
            declaration = ""
        else:
            begin = begin if declaration else i
            declaration = f"{declaration} {code}".strip()
            if code.endswith("{") and not SCOPE.fullmatch(declaration):
                end = lines[begin][: -len(lines[begin].lstrip())] + "}"
            elif code.endswith(("{", ";", "}")):
                declaration = ""
    assert not end, f"no end of {declaration!r}: make format"
    return found


def what_is_long(text: str) -> list[str]:
    long = [
        f"{one.head!r} in line {one.line} has {one.n_lines} lines"
        for one in functions(text)
        if one.n_lines > LONGEST_FUNCTION
    ]
    if (n := text.count("\n")) > LONGEST_FILE:
        long.append(f"it has {n} lines")
    return long


def says_why(text: str) -> bool:
    head = text.partition("\n#")[0].partition("\n\n")[0]
    return f"\n//\n{REASON}" in head


def includes(file: Path) -> list[str]:
    return re.findall(r'^#include [<"]([^">]+)[">]', (SRC / file).read_text(), re.MULTILINE)


def ours(file: Path) -> list[Path]:
    return [Path(name) for name in includes(file) if (SRC / name).is_file()]


def folder(file: Path) -> str:
    return file.parts[0] if len(file.parts) > 1 else TOP


def test_each_folder_is_known_and_says_what_lives_in_it() -> None:
    assert {folder(file) for file in FILES} == set(BELOW)
    for name in BELOW:
        assert len((SRC / name / "README.md").read_text().splitlines()) <= 10


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_file_reaches_above_its_folder(file: Path) -> None:
    allowed = BELOW[folder(file)] | {folder(file)}
    if file == Path("llama_flash.cpp"):
        allowed = allowed | {"observe"}
    up = [str(name) for name in ours(file) if folder(name) not in allowed]
    assert not up, f"{file} includes {up}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_our_headers_are_named_by_their_path(file: Path) -> None:
    names = {path.name for path in FILES} - {"ops.h"}
    bare = [name for name in includes(file) if name in names and not (SRC / name).is_file()]
    assert not bare, f"{file} includes {bare}"


def test_files_are_no_circle() -> None:
    """A header and its source count as one."""
    graph: dict[Path, set[Path]] = {}
    for file in FILES:
        module = file.with_suffix("")
        graph.setdefault(module, set()).update(name.with_suffix("") for name in ours(file))
    left = {module: names - {module} for module, names in graph.items()}
    while ends := [module for module, names in left.items() if not names & left.keys()]:
        for module in ends:
            del left[module]
    assert not left, f"a circle: {sorted(map(str, left))}"


def test_memory_and_reads_know_no_ggml() -> None:
    for file in FILES:
        if folder(file) in ("base", "memory", "io"):
            assert not [name for name in includes(file) if "ggml" in name], file


def test_ops_do_not_reach_the_reader() -> None:
    for file in FILES:
        if folder(file) == "ops":
            assert not [name for name in includes(file) if name.startswith("io/") and name != "io/read_queue.h"], file


VALUES = "const limit LIMITS[] = {\n    { (int) 1, 2 },\n};\n"
STRUCT = "struct limit {\n    int error; // errno\n};\n"
PLACES = "enum class place : uint8_t {\n    slot, // in one\n};\n"
CLASS = "class pool final : base {\n  public:\n    int n() { return 1; } // of all\n\n"


@pytest.mark.parametrize(
    ("before", "head"),
    [
        ("", "static int32_t f(int a) {"),
        ("", "void pool::take(int a) const {"),
        ("", "template <typename F> bool each(F f) {"),
        ("", "pool & pool::operator=(pool && other) noexcept {"),
        ("", "bool f(int a, // of a\n       int b) {"),
        ("", "pool::pool(int a) :\n    a(a), b{ 0 } {"),
        (STRUCT + VALUES, "struct limit f() {"),
        ("namespace {\n\n", "int f(int a = 0) {"),
        (f"namespace {{\n\n{CLASS}", "    int f() override {"),
        (PLACES, "place f(place p) { // of a slot"),
    ],
)
def test_a_long_function_is_found_wherever_it_stands(before: str, head: str) -> None:
    def text(n_lines: int) -> str:
        indent = head[: -len(head.lstrip())]
        body = [*head.split("\n"), f"{indent}    if (a) {{", f"{indent}    }}"]
        body += [f"{indent}    // {{"] * (n_lines - len(body) - 1) + [f"{indent}}}"]
        return f"// What lives here.\n\n{before}// Why.\n" + "\n".join(body) + "\n"

    assert not what_is_long(text(LONGEST_FUNCTION))
    line = 4 + before.count("\n")
    first = head.partition("\n")[0].strip()
    assert what_is_long(text(LONGEST_FUNCTION + 1)) == [f"{first!r} in line {line} has 61 lines"]


def test_a_long_file_is_found() -> None:
    assert not what_is_long("int a;\n" * LONGEST_FILE)
    assert what_is_long("int a;\n" * (LONGEST_FILE + 1)) == ["it has 601 lines"]


def test_a_reason_stands_in_the_head() -> None:
    assert says_why("// What lives here.\n//\n// Long: one table.\n#include <vector>\n")
    assert not says_why("// What lives here.\n#include <vector>\n\n//\n// Long: one table.\n")


@pytest.mark.parametrize("file", SOURCES, ids=lambda path: str(path.relative_to(PLUGIN)))
def test_nothing_is_long_without_a_reason(file: Path) -> None:
    text = file.read_text()
    long = what_is_long(text)
    if says_why(text):
        assert long, f"{file}: nothing in it is long any more: its head says so still"
    else:
        assert not long, f"{file}: {'; '.join(long)}: divide it, or say why in the file's head (Long: ...)"
