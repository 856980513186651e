"""What an item's numbers were made of, in 16 hexadecimal digits: its question and the bytes of its
picture. A run that goes on refuses items that are others now under the same names. Kept free of
torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from vlmdiag.runs.checked import Checked, sign

_known: ContextVar[Checked | None] = ContextVar("known", default=None)
ENCODER = json.JSONEncoder(sort_keys=True, default=repr)
EDGE = 2**16  # bytes at both ends of a larger file that tell it from others, with its size
IDENTITY = ("id", "extra")  # what names an item, or what else a list says of it
NEWER = ("given",)  # fields that were added since: none is the same as before


def digest_of(item: object) -> str:
    """The digest of item.inputs, of an item without them of its fields; paths stand for the files
    that they lead to, wherever those are."""
    content = ENCODER.encode(_plain(getattr(item, "inputs", item)))
    return hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def file_digest(path: Path) -> str | None:
    """A file's digest, of a large one by its size and both ends; None where it cannot be read, as a
    picture that has not been downloaded yet."""
    known = _known.get()
    try:
        if known is not None and isinstance(digest := known.file(path), str):
            return digest
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            data = file.read(EDGE)
            if stat.st_size > EDGE:
                file.seek(max(EDGE, stat.st_size - EDGE))
                data += file.read()
    except (OSError, ValueError):
        return None
    digest = hashlib.sha256(b"%d\n" % stat.st_size + data).hexdigest()[:16]
    if known is not None:
        known.note_file(path, sign(stat), digest)
    return digest


@contextlib.contextmanager
def known_files(checked: Checked) -> Iterator[None]:
    """In this context a picture that has not changed since a run noted its digest is not read."""
    token = _known.set(checked)
    try:
        yield
    finally:
        _known.reset(token)


@functools.cache
def _names(kind: type) -> list[str]:
    """The fields of a dataclass that say what an item is made of."""
    names = [field.name for field in dataclasses.fields(kind)]
    return [name for name in names if name not in IDENTITY]


def _plain(value: object) -> object:
    """A value as JSON takes it."""
    if isinstance(value, Path):
        return file_digest(value) or value.name
    if dataclasses.is_dataclass(value):
        fields = {name: _plain(getattr(value, name)) for name in _names(value.__class__)}
        return {
            name: part for name, part in fields.items() if part is not None or name not in NEWER
        }
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
