"""The wheel has the licences of what it carries of others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import pytest
from repository import ROOT

sys.path.insert(0, str(ROOT / "ci/engine"))
import licenses
from report import BuildError

sys.path.pop(0)

ENGINE = ROOT / "build/engine"
SHIPPED = Path(llama_cpp.__file__).parent / "licenses/THIRD-PARTY.txt"


def test_the_installed_wheel_has_them() -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    for part in licenses.PARTS:
        assert part.text(ENGINE) in text
    for notice in (
        "Copyright (c) 2012-2021 Yann Collet",
        "Niels Lohmann",
        "Copyright (c) 2017 yhirose",
        "Mozilla Found",
    ):
        assert notice in text
    if (ROOT / "build/ui/LICENSES.txt").is_file() and (ROOT / "build/ui/dist/index.html").is_file():
        assert "What the page for chats" in text and "pdfjs-dist" in text


def test_a_library_that_the_engine_gets_is_noticed(tmp_path: Path) -> None:
    vendor = tmp_path / "vendor/llama.cpp/vendor"
    for name in ("stb", "hash/xxhash", "nlohmann"):
        (vendor / name).mkdir(parents=True)
    licenses.check_vendored(tmp_path)
    (vendor / "hash/md5").mkdir()
    with pytest.raises(BuildError, match="vendor/hash/md5: a library of the engine's whose licence is not in"):
        licenses.check_vendored(tmp_path)


def test_a_licence_that_has_moved_is_noticed(tmp_path: Path) -> None:
    part = licenses.Part("a library", "a.h", "Permission is hereby granted")
    with pytest.raises(BuildError, match="is not there, and has the licence of a library"):
        part.text(tmp_path)
    (tmp_path / "a.h").write_text("// what it is for\nint a;\n")
    with pytest.raises(BuildError, match="no comment has 'Permission is hereby granted'"):
        part.text(tmp_path)
    (tmp_path / "a.h").write_text(
        "/* first */\nint a;\n// Copyright (c) A\n//\n// Permission is hereby granted ...\nint b;\n"
    )
    assert part.text(tmp_path) == "Copyright (c) A\n\nPermission is hereby granted ..."


def test_the_page_has_those_of_its_packages_of_its_styles_and_of_what_is_copied_into_it(tmp_path: Path) -> None:
    def package(name: str, **told: object) -> Path:
        folder = tmp_path / "node_modules" / name
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"name": name, "version": "1.0.0", **told}))
        return folder

    (package("@a/styles", license="MIT") / "LICENSE").write_text("styles' licence\n")
    (package("workbox-core", license="MIT") / "LICENSE").write_text("worker's licence\n")
    package("bare", license="MIT", author={"name": "B. Are"})
    package("unused", license="MIT")
    for file, text in {
        "src/app.css": "@import '@a/styles';\n@import './own.css';\n",
        "src/lib/vendors/copied/LICENCE.md": "copied licence\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    bundled = tmp_path / "bundled"
    lines = [
        {"name": "shown", "version": "2.0.0", "license": "MIT", "text": "shown licence", "notice": "a notice"},
        {"name": "bare", "version": "1.0.0", "license": "MIT", "text": None, "notice": None},
    ]
    bundled.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = licenses.of_page(bundled, tmp_path)
    assert found == {
        "shown 2.0.0": "shown licence\n\na notice",
        "bare 1.0.0": "MIT, by B. Are: its package.json says so, and it has no more of it.",
        "@a/styles 1.0.0": "styles' licence",
        "workbox-core 1.0.0": "worker's licence",
        "copied": "copied licence",
    }
    (tmp_path / "src/lib/vendors/other").mkdir()
    with pytest.raises(BuildError, match="other: there is no licence"):
        licenses.of_page(bundled, tmp_path)


def test_a_package_without_a_licence_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "node_modules/none"
    folder.mkdir(parents=True)
    (folder / "package.json").write_text('{"name": "none", "version": "1.0.0"}')
    bundled = tmp_path / "bundled"
    bundled.write_text('{"name": "none", "version": "1.0.0", "license": null, "text": null, "notice": null}\n')
    with pytest.raises(BuildError, match="none: the package has no licence"):
        licenses.of_page(bundled, tmp_path)
