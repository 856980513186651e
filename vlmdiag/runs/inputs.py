"""What an item's numbers were made of, in 16 hexadecimal digits: its question and the bytes of its
picture. A run that goes on refuses items that are others now under the same names. Kept free of
torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

EDGE = 2**16  # bytes at both ends of a larger file that tell it from others, with its size
IDENTITY = ("id", "extra")  # what names an item, or what else a list says of it


def digest_of(item: object) -> str:
    """The digest of item.inputs, of an item without them of its fields; paths stand for the files
    that they lead to, wherever those are."""
    content = json.dumps(_plain(getattr(item, "inputs", item)), sort_keys=True, default=repr)
    return hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def file_digest(path: Path) -> str | None:
    """A file's digest, of a large one by its size and both ends; None where it cannot be read, as a
    picture that has not been downloaded yet."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            data = file.read(EDGE)
            if size > EDGE:
                file.seek(max(EDGE, size - EDGE))
                data += file.read()
    except (OSError, ValueError):
        return None
    return hashlib.sha256(b"%d\n" % size + data).hexdigest()[:16]


def _plain(value: object) -> object:
    """A value as JSON takes it."""
    if isinstance(value, Path):
        return file_digest(value) or value.name
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.name not in IDENTITY]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
