"""The C++ part of `make lint`: what .clang-format and .clang-tidy are there for is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

BIN = Path(sys.executable).parent

UNNAMED_LOCK = """\
#include <mutex>

std::mutex mutex;
int        counter;

void locked_for_nothing() {
    std::lock_guard<std::mutex>{ mutex };
    counter++;
}
"""
MOVED_FROM = """\
#include <string>
#include <utility>

size_t after(std::string text) {
    const std::string taken = std::move(text);
    return text.size() + taken.size();
}
"""
NO_OVERRIDE = """\
struct base {
    virtual ~base() = default;
    virtual bool supports_op(int op) = 0;
};

struct derived : base {
    virtual bool supports_op(int op) { return op > 0; }
};

bool use(int op) {
    return derived().supports_op(op);
}
"""


def run(tool: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / tool, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("source", "check"),
    [
        (UNNAMED_LOCK, "bugprone-unused-raii"),
        (MOVED_FROM, "bugprone-use-after-move"),
        (NO_OVERRIDE, "modernize-use-override"),
    ],
)
def test_clang_tidy_finds(tmp_path: Path, source: str, check: str) -> None:
    shutil.copy(ROOT / ".clang-tidy", tmp_path)
    (tmp_path / "source.cpp").write_text(source)
    result = run("clang-tidy", tmp_path, "--quiet", "--warnings-as-errors=*", "source.cpp", "--", "-std=c++17")
    assert result.returncode != 0 and f"[{check}" in result.stdout, result.stdout + result.stderr


def test_clang_format_keeps_what_is_in_ggml_s_style_and_finds_what_is_not(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".clang-format", tmp_path)
    good = "static int64_t f(const ggml_tensor * x) {\n    return (int64_t) x->ne[0];\n}\n"
    for name, text in (("good.cpp", good), ("bad.cpp", good.replace("ggml_tensor * x", "ggml_tensor* x"))):
        (tmp_path / name).write_text(text)
    assert run("clang-format", tmp_path, "--dry-run", "-Werror", "--style=file", "good.cpp").returncode == 0
    result = run("clang-format", tmp_path, "--dry-run", "-Werror", "--style=file", "bad.cpp")
    assert result.returncode != 0 and "bad.cpp:1:" in result.stderr
