"""Writes python/llama_flash/native/bindings.py from plugin/include/llama_flash.h.

`--check` writes nothing and exits 1 if the file is stale.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

from pycparser import c_ast, c_parser

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "plugin/include/llama_flash.h"
BINDINGS = ROOT / "python/llama_flash/native/bindings.py"

SCALARS = {
    "bool": "c_bool",
    "char": "c_char",
    "float": "c_float",
    "int32_t": "c_int32",
    "int64_t": "c_int64",
    "size_t": "c_size_t",
    "uint8_t": "c_uint8",
    "uint32_t": "c_uint32",
    "uint64_t": "c_uint64",
}
PYTHON_TYPES = {"c_bool": "bool", "c_char": "bytes", "c_float": "float"}  # of a field, all others are int
TYPEDEFS = "".join(f"typedef int {name};" for name in SCALARS if name not in ("char", "float"))

PROLOGUE = '''\
"""The plugin's C interface: structures, enums and prototypes of libllama_flash.

Generated from plugin/include/llama_flash.h by ci/tools/generate_bindings.py (`make bindings`): do not edit. The header
says what the functions do, in which order and from which thread they are called. Opaque structures are addresses (int).
"""

from __future__ import annotations

import ctypes
import functools
import os
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar
'''

LOADER = '''
def library_path() -> Path:
    """Where libllama_flash is: beside libllama, which LLAMA_CPP_LIB_PATH may place elsewhere."""
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    if override is not None:
        return Path(override) / "libllama_flash.so"
    import llama_cpp

    return Path(llama_cpp.__file__).parent / "lib" / "libllama_flash.so"


@functools.cache
def load() -> ctypes.CDLL:
    """The plugin with its prototypes set. Raises OSError if it is missing or was built from another header."""
    import llama_cpp  # noqa: F401  # its libllama is the one that the plugin is to find in the process

    path = library_path()
    lib = ctypes.CDLL(str(path))
    for name, (restype, argtypes) in _PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype = restype
        function.argtypes = argtypes
    version = int(lib.llama_flash_api_version())
    if version != LLAMA_FLASH_API_VERSION:
        raise OSError(f"{path} has interface version {version}, llama_flash needs {LLAMA_FLASH_API_VERSION}")
    return lib
'''


class Header:
    """The header as pycparser sees it, and its comments by line."""

    def __init__(self, text: str) -> None:
        self.constants = re.findall(r"^#define (LLAMA_FLASH_\w+) +(\d+)$", text, re.MULTILINE)
        self.comments = self._comments(text)
        self.ast = c_parser.CParser().parse(TYPEDEFS + self._declarations(text))
        self.structs: dict[str, c_ast.Struct] = {}
        self.enums: dict[str, c_ast.Enum] = {}
        self.functions: list[c_ast.Decl] = []
        for node in self.ast.ext:
            kind = node.type if isinstance(node, c_ast.Decl) else None
            if isinstance(kind, c_ast.Struct) and kind.decls:
                self.structs[kind.name] = kind
            elif isinstance(kind, c_ast.Enum):
                self.enums[kind.name] = kind
            elif isinstance(kind, c_ast.FuncDecl):
                self.functions.append(node)

    @staticmethod
    def _comments(text: str) -> dict[int, str]:
        found = {}
        for number, line in enumerate(text.splitlines(), start=1):
            _, slashes, comment = line.partition("//")
            if slashes:
                found[number] = comment.strip()
        return found

    @staticmethod
    def _declarations(text: str) -> str:
        """The header without preprocessor lines, comments, linkage and attributes; line numbers stay."""
        text = re.sub(r"//.*", "", text)
        text = re.sub(r'#ifdef __cplusplus\n(?:extern "C" \{|\})\n#endif', "\n\n", text)
        text = re.sub(r"^#.*", "", text, flags=re.MULTILINE)
        return text.replace("LLAMA_FLASH_API ", "")

    def comment_above(self, line: int) -> str:
        """The comment that ends on the line before `line`, if it stands alone there."""
        above = self.comments.get(line - 1)
        return above if above else ""


class Generator:
    def __init__(self, header: Header) -> None:
        self.header = header

    def ctype(self, node: c_ast.Node) -> str:
        """The ctypes expression for a C type."""
        if isinstance(node, c_ast.TypeDecl):
            return self._named(node)
        if isinstance(node, c_ast.ArrayDecl):
            return f"{self.ctype(node.type)} * {node.dim.value}"
        if isinstance(node, c_ast.PtrDecl):
            return self._pointer(node.type)
        raise TypeError(f"{node.coord}: {type(node).__name__} is not supported")

    @staticmethod
    def _named(node: c_ast.TypeDecl) -> str:
        if isinstance(node.type, c_ast.Enum):
            return "ctypes.c_int"
        if isinstance(node.type, c_ast.Struct):
            return str(node.type.name)
        (name,) = node.type.names
        return f"ctypes.{SCALARS[name]}"

    def _pointer(self, target: c_ast.Node) -> str:
        if isinstance(target, c_ast.FuncDecl):
            return "ctypes.c_void_p"
        if isinstance(target, c_ast.PtrDecl):
            return f"ctypes.POINTER({self._pointer(target.type)})"
        base = target.type
        if isinstance(base, c_ast.Struct):
            return f"ctypes.POINTER({base.name})" if base.name in self.header.structs else "ctypes.c_void_p"
        (name,) = base.names
        if name == "void":
            return "ctypes.c_void_p"
        return "ctypes.c_char_p" if name == "char" else f"ctypes.POINTER(ctypes.{SCALARS[name]})"

    def enum(self, enum: c_ast.Enum) -> str:
        lines = [f"class {enum.name}(IntEnum):"]
        value = -1
        for item in enum.values.enumerators:
            value = int(item.value.value) if item.value else value + 1
            lines.append(self._commented(f"    {item.name} = {value}", item.coord.line))
        return "\n".join(lines)

    def struct(self, struct: c_ast.Struct) -> str:
        lines = [f"class {struct.name}(ctypes.Structure):"]
        if doc := self.header.comment_above(struct.coord.line):
            lines += [f'    """{doc[0].upper()}{doc[1:]}."""', ""]
        fields = [(decl.name, self.ctype(decl.type), decl.coord.line) for decl in struct.decls]
        lines += ["    _fields_: ClassVar = ["]
        lines += [f'        ("{name}", {ctype}),' for name, ctype, _ in fields]
        lines += ["    ]", ""]
        for name, ctype, line in fields:
            python = PYTHON_TYPES.get(ctype.split(" *")[0].removeprefix("ctypes."), "int")
            if ctype.startswith("ctypes.POINTER") or ctype in self.header.structs:
                python = "Any" if ctype.startswith("ctypes") else ctype
            lines.append(self._commented(f"    {name}: {python}", line))
        return "\n".join(lines)

    def prototype(self, decl: c_ast.Decl) -> str:
        function = decl.type
        returned = function.type
        void = isinstance(returned, c_ast.TypeDecl) and getattr(returned.type, "names", None) == ["void"]
        restype = "None" if void else self.ctype(returned)
        arguments = [
            self.ctype(parameter.type)
            for parameter in (function.args.params if function.args else [])
            if not (isinstance(parameter, c_ast.Typename) and getattr(parameter.type.type, "names", None) == ["void"])
        ]
        one_line = f'    "{decl.name}": ({restype}, [{", ".join(arguments)}]),'
        if len(one_line) <= 120:
            return one_line
        inner = "\n".join(f"            {argument}," for argument in arguments)
        return f'    "{decl.name}": (\n        {restype},\n        [\n{inner}\n        ],\n    ),'

    def _commented(self, code: str, line: int) -> str:
        comment = self.header.comments.get(line)
        return f"{code}  # {comment}" if comment else code

    def module(self) -> str:
        parts = [PROLOGUE + "\n" + "\n".join(f"{name} = {value}" for name, value in self.header.constants)]
        parts += [self.enum(enum) for enum in self.header.enums.values()]
        parts += [self.struct(struct) for struct in self.header.structs.values()]
        prototypes = "\n".join(self.prototype(function) for function in self.header.functions)
        names = ",\n    ".join(self.header.structs)
        parts += [f"STRUCTURES: tuple[type[ctypes.Structure], ...] = (\n    {names},\n)"]
        text = "\n\n\n".join(parts)
        text += "\n\n# name: (result, arguments)\n"
        text += f"_PROTOTYPES: dict[str, tuple[type | None, list[type]]] = {{\n{prototypes}\n}}\n"
        return text + "\n" + LOADER


def generate(header_text: str) -> str:
    return Generator(Header(header_text)).module()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if bindings.py is stale; write nothing")
    args = parser.parse_args()
    text = generate(HEADER.read_text(encoding="utf-8"))
    current = BINDINGS.read_text(encoding="utf-8") if BINDINGS.exists() else ""
    if args.check:
        if text != current:
            diff = difflib.unified_diff(
                current.splitlines(), text.splitlines(), "bindings.py", "header", n=1, lineterm=""
            )
            print("\n".join(diff))
            print("error: python/llama_flash/native/bindings.py is stale: run `make bindings`", file=sys.stderr)
            sys.exit(1)
    elif text != current:
        BINDINGS.write_text(text, encoding="utf-8")
        print(f"wrote {BINDINGS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
