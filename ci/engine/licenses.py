"""The licences of what a wheel carries of others: the engine's, those of what is compiled into it, those of the page.

CMake has `write` called and packs the file: llama_cpp/licenses/THIRD-PARTY.txt. Part by part it is what each author has
written, out of the engine's sources (a file of its own, or a comment in a source) and out of the packages of the page.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from report import BuildError, run_main

_CPP = "vendor/llama.cpp/"
_VENDOR = _CPP + "vendor/"
_RULE = "=" * 80


@dataclass(frozen=True)
class Part:
    """What is compiled into the wheel's libraries, and the file of the engine's that has its licence.

    comment: the file is a source, and this is in the comment that says the licence.
    """

    name: str
    file: str
    comment: str = ""

    def text(self, engine: Path) -> str:
        path = engine / self.file
        if not path.is_file():
            raise BuildError(f"{path}: is not there, and has the licence of {self.name}: see {Path(__file__).name}")
        text = path.read_text(encoding="utf-8", errors="replace")
        if not self.comment:
            return text.strip()
        for comment in _comments(text):
            if self.comment in comment:
                return comment
        raise BuildError(f"{path}: no comment has {self.comment!r}, the licence of {self.name}")


PARTS = (
    Part("llama-cpp-python", "LICENSE.md"),
    Part("llama.cpp and ggml", _CPP + "LICENSE"),
    Part("llamafile: sgemm", _CPP + "ggml/src/ggml-cpu/llamafile/sgemm.cpp", "Permission is hereby granted"),
    Part("YaRN: rope", _CPP + "ggml/src/ggml-cpu/ops.cpp", "Jeffrey Quesnelle"),
    Part("base64.hpp", _CPP + "common/base64.hpp", "public domain"),
    Part("cpp-httplib", _VENDOR + "cpp-httplib/LICENSE"),
    Part("JSON for Modern C++", _CPP + "licenses/LICENSE-jsonhpp"),
    Part("rotate-bits", _VENDOR + "hash/rotate-bits/LICENSE.md"),
    Part("SHA-1 in C", _VENDOR + "hash/sha1/sha1.c", "Public Domain"),
    Part("SHA-256", _VENDOR + "hash/sha256/LICENSE"),
    Part("xxHash", _VENDOR + "hash/xxhash/LICENSE"),
    Part("miniaudio", _VENDOR + "miniaudio/miniaudio.h", "ALTERNATIVE 2 - MIT"),
    Part("subprocess.h", _VENDOR + "sheredom/subprocess.h", "public domain"),
    Part("stb_image", _VENDOR + "stb/stb_image.h", "ALTERNATIVE A - MIT"),
)


def _comments(text: str) -> Iterator[str]:
    """The comments of a C or C++ source, those of lines that follow each other as one, without their marks."""
    for match in re.finditer(r"/\*.*?\*/|(?:^[ \t]*//[^\n]*\n)+", text, re.DOTALL | re.MULTILINE):
        lines = re.sub(r"^/\*+|\*/$", "", match[0].strip()).splitlines()
        yield "\n".join(re.sub(r"^[ \t]*(?://|\*)?[ \t]?", "", line).rstrip() for line in lines).strip()


def check_vendored(engine: Path) -> None:
    """Raises BuildError where the engine has a library whose licence is not known here."""
    known = {Path(part.file).parent for part in PARTS} | {Path(_VENDOR + "nlohmann")}
    folders = [engine / _VENDOR / "hash"] if (engine / _VENDOR / "hash").is_dir() else []
    for folder in (engine / _VENDOR, *folders):
        for entry in sorted(folder.iterdir()):
            path = entry.relative_to(engine)
            if entry.is_dir() and entry not in folders and path not in known:
                raise BuildError(f"{path}: a library of the engine's whose licence is not in {Path(__file__).name}")


def of_page(bundled: Path, sources: Path) -> dict[str, str]:
    """Licences of what the page has of others, by name and version.

    Args:
        bundled: what the page's tool has found, package by package (ui_tools/vite.licenses.config.ts).
        sources: of the page, its packages in node_modules.

    Raises:
        BuildError: a package says nothing of its licence.
    """
    found: dict[str, str] = {}
    for line in bundled.read_text(encoding="utf-8").splitlines():
        package = json.loads(line)
        name, text = package["name"], "\n\n".join(filter(None, (package["text"], package["notice"])))
        found[f"{name} {package['version']}"] = text.strip() or _of_package(sources / "node_modules" / name)
    for name in sorted(_named_in(sources)):
        folder = sources / "node_modules" / name
        version = json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]
        found.setdefault(f"{name} {version}", "\n\n".join(_said(folder)) or _of_package(folder))
    for folder in sorted((sources / "src/lib/vendors").glob("*")):
        if text := "\n\n".join(_said(folder)):
            found[folder.name] = text
        elif folder.is_dir():
            raise BuildError(f"{folder}: there is no licence")
    return found


def _of_package(folder: Path) -> str:
    """Of one without a file that has the text."""
    told = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    if not told.get("license"):
        raise BuildError(f"{folder}: the package has no licence")
    author = told.get("author") or "an author it does not name"
    author = author if isinstance(author, str) else author.get("name")
    return f"{told['license']}, by {author}: its package.json says so, and it has no more of it."


def _said(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    files = sorted(file for file in folder.iterdir() if re.match(r"(?i)licen[cs]e|copying|notice", file.name))
    return [file.read_text(encoding="utf-8", errors="replace").strip() for file in files if file.is_file()]


def _named_in(sources: Path) -> Iterator[str]:
    """Packages that no module is of: those whose rules are in the page's styles, and those of its service worker."""
    for style in (sources / "src").rglob("*.css"):
        for name in re.findall(r"@(?:import|plugin)\s+['\"]((?:@[\w.-]+/)?[\w.-]+)", style.read_text(encoding="utf-8")):
            if (sources / "node_modules" / name / "package.json").is_file():
                yield name
    yield from sorted(folder.name for folder in (sources / "node_modules").glob("workbox-*") if folder.is_dir())


def joined(parts: dict[str, str]) -> str:
    return "".join(f"{_RULE}\n{name}\n{_RULE}\n\n{text}\n\n" for name, text in parts.items())


def write(engine: Path, page: Path | None, output: Path) -> None:
    """page: the licences of the page that is packed; None: there is none."""
    check_vendored(engine)
    text = "What this package has of others, and under which licences.\n\n"
    text += joined({part.name: part.text(engine) for part in PARTS})
    if page is not None:
        text += "What the page for chats, which is packed into the server's library, has of others.\n\n"
        text += page.read_text(encoding="utf-8")
    if not output.is_file() or output.read_text(encoding="utf-8") != text:
        output.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="licences of the page")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    write(args.engine, args.page, args.output)


if __name__ == "__main__":
    run_main(main)
