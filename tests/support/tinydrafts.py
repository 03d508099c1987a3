"""Files for drafts: models whose vocabulary is another one."""

from __future__ import annotations

from pathlib import Path

__all__ = ["changed_vocabulary"]


def changed_vocabulary(model: Path, to: Path, token: int) -> Path:
    """A copy of a model in which the text of one token is another one of the same length."""
    from gguf import GGUFReader

    field = GGUFReader(model).fields["tokenizer.ggml.tokens"]
    text = bytes(field.parts[field.data[token]])
    changed = bytes(b"\x01" * len(text))
    data = model.read_bytes()
    at = data.index(len(text).to_bytes(8, "little") + text, data.index(b"tokenizer.ggml.tokens"))
    to.write_bytes(data[: at + 8] + changed + data[at + 8 + len(text) :])
    return to
