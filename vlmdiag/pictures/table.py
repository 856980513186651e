"""A table whose rows hold pictures: TSV as VLMEvalKit and EmbSpatial-Bench write it, or JSON.

Rows are read one by one; a row's picture is read again from the byte at which the row begins.
"""

from __future__ import annotations

import ast
import binascii
import csv
import hashlib
import io
import json
import re
import sys
from base64 import b64decode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from PIL.Image import Image

from vlmdiag.cli import UsageError
from vlmdiag.pictures.samples import PICTURES, load_image, picture_header
from vlmdiag.types import Fields

Row = dict[str, str]  # a row of the table, {column: text}

# a cell of the picture column that is no longer is the index of the row whose picture it is
REFERENCE = 64
PICTURE_COLUMNS = ("image_base64", "image", "image_path")
LETTERS = "ABCD"
# pictures in base64
csv.field_size_limit(sys.maxsize)


def rows_of(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield (byte offset, row as {column: text}) of a TSV with a header, of a JSON list of objects,
    or of JSON lines; every cell is text. Blank lines are skipped.

    A cell in quotation marks may hold tabs and lines, doubled marks are one, as csv writes it; a
    mark that is never closed within its row is text. UsageError where a row has not the header's
    cells, or the file is none of these.
    """
    try:
        yield from _rows_of(path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 table ({error}); save it as UTF-8") from error


def _rows_of(path: str | Path) -> Iterator[tuple[int, Row]]:
    with open(path, "rb") as file:
        if _is_json(file):
            yield from _json_rows(path, file)
            return
        columns = _columns(path, file)
        while True:
            offset = file.tell()
            line = file.readline()
            if not line:
                return
            if line.strip():
                cells = _cells(path, file, line, len(columns))
                yield offset, dict(zip(columns, cells, strict=True))


def row_at(path: str | Path, offset: int) -> Row:
    """The row that begins at a byte of the table."""
    with open(path, "rb") as file:
        if _is_json(file):
            return _json_row_at(file, offset)
        columns = _columns(path, file)
        file.seek(offset)
        cells = _cells(path, file, file.readline(), len(columns))
        return dict(zip(columns, cells, strict=True))


# --- pictures -------------------------------------------------------------------------------------


def picture_cell(row: Row) -> str:
    """What a row says of its picture, '' where it says nothing: base64 without a data: prefix and
    white space, a path, or the index of the row that has it. ValueError for several pictures."""
    for column in PICTURE_COLUMNS:
        cell = _cleaned(row.get(column, ""))
        if cell:
            return cell
    return ""


def _cleaned(cell: str) -> str:
    cell = cell.strip()
    if cell.startswith("[") and cell.endswith("]"):
        return _only_one(cell)
    if cell.startswith(("b'", 'b"')) and cell.endswith(cell[1]):  # Python's text of bytes
        cell = cell[2:-1]
    if cell.startswith("data:"):
        cell = cell.partition(",")[2]
    if is_path(cell):
        return cell
    return "".join(cell.split())


def _only_one(cell: str) -> str:
    """The picture of a list of one."""
    try:
        pictures = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("its picture is a list that cannot be read") from error
    if not pictures:
        return ""
    if len(pictures) > 1:
        raise ValueError("more than one picture")
    return _cleaned(str(pictures[0]))


def is_path(cell: str) -> bool:
    """Whether a picture cell is the path of a picture."""
    return len(cell) < 1000 and Path(cell).suffix.lower() in PICTURES


def is_reference(cell: str) -> bool:
    """Whether a picture cell is the index of the row that has the picture."""
    return 0 < len(cell) <= REFERENCE and not is_path(cell)


class Pictures:
    """Where the pictures of a table's rows are. VLMEvalKit writes a picture once, and its row's
    index into the other rows that have it."""

    def __init__(self) -> None:
        self._of_key: dict[str, tuple[int, str]] = {}
        self._of_index: dict[str, tuple[int, str]] = {}
        self._wanted: dict[str, str] = {}  # key -> index

    def add(self, key: str, row: Row, offset: int) -> None:
        """Take a row by a name of its own. ValueError: it has no picture, or several."""
        cell = picture_cell(row)
        if not cell:
            raise ValueError("no picture")
        if is_reference(cell):
            self._wanted[key] = cell
            return
        digest = hashlib.blake2b(cell.encode(), digest_size=8).hexdigest()
        self._of_key[key] = offset, digest
        self._of_index.setdefault(row.get("index", "").strip(), self._of_key[key])

    def of(self, key: str) -> tuple[int, str]:
        """(byte at which the row begins that has the picture, digest of the picture) of a row, once
        all were added. ValueError where no row has it."""
        if key in self._of_key:
            return self._of_key[key]
        index = self._wanted[key]
        if index not in self._of_index:
            raise ValueError("its picture is that of a row that the table does not have")
        return self._of_index[index]


def letter_of(answer: str, options: Mapping[str, str]) -> str:
    """The letter of an answer that is a letter, (A) or A. too, the text of an option, or an index
    from 0 as EmbSpatial-Bench has it; in capitals what is none of them. UsageError for an index
    past the options. options {letter: text}, also of those that are not there."""
    named = [letter for letter, text in options.items() if text.lower() == answer.lower()]
    if len(named) == 1:
        return named[0]
    index = re.fullmatch(r"(\d+)(?:\.0+)?", answer)
    if index:
        if int(index[1]) >= len(options):
            raise UsageError(
                f"the answer {answer}: letters {min(options)} to {max(options)} or indices 0 to"
                f" {len(options) - 1} of the options are wanted"
            )
        return list(options)[int(index[1])]
    return answer.strip(" ().:").upper()


def picture_at(path: str | Path, offset: int) -> Image:
    """The picture of the row that begins at a byte of the table, upright RGB as load_image() gives
    it; ValueError where it is none."""
    try:
        return load_image(picture_file(path, offset))
    except (OSError, ValueError) as error:
        raise _unreadable(offset, error) from error


def picture_header_at(path: str | Path, offset: int) -> tuple[tuple[int, int], int]:
    """((width, height) of the upright picture, its EXIF orientation) of the row that begins at a
    byte of the table; ValueError where it is none."""
    try:
        return picture_header(picture_file(path, offset))
    except (OSError, ValueError) as error:
        raise _unreadable(offset, error) from error


def picture_file(path: str | Path, offset: int) -> Path | io.BytesIO:
    """Where the picture of a row can be read. A path is relative to the table's folder. ValueError
    where the row has no base64."""
    cell = picture_cell(row_at(path, offset))
    if is_path(cell):
        return Path(path).parent / cell
    try:
        return io.BytesIO(b64decode(cell, validate=True))
    except binascii.Error as error:
        raise ValueError(f"no base64: {error}") from error


def _unreadable(offset: int, error: Exception) -> ValueError:
    return ValueError(f"the picture of the row at byte {offset} cannot be read ({error})")


# --- TSV ------------------------------------------------------------------------------------------


def _columns(path: str | Path, file: BinaryIO) -> list[str]:
    header = file.readline().decode("utf-8-sig")
    try:
        columns = [name.strip() for name in next(csv.reader([header], delimiter="\t"), [])]
    except csv.Error as error:  # such as lines that end with carriage returns only
        raise UsageError(f"{path}: its first line is no header of a table ({error})") from error
    if not columns:
        raise UsageError(f"{path} is empty")
    for name in columns:
        if name and columns.count(name) > 1:
            raise UsageError(f"{path} has the column {name} more than once")
    return columns


def _cells(path: str | Path, file: BinaryIO, line: bytes, count: int) -> list[str]:
    """The cells of the row that a line begins; the file is then after that row."""
    text = line.decode("utf-8").rstrip("\r\n")
    as_written = text.split("\t")
    after = file.tell()
    has_quotes = any(cell.startswith('"') for cell in as_written)
    if has_quotes:
        cells = _quoted_cells(file, text)
        if cells is not None and len(cells) == count:
            return cells
        file.seek(after)
    if len(as_written) == count:
        return as_written
    why = f"{path}: a row of {len(as_written)} cells where the header has {count}"
    if has_quotes:
        why += (
            f" ({as_written[0]:.40}); a cell in it begins with a quotation mark that is not closed"
            " as a table with quoted cells closes it"
        )
    raise UsageError(why)


def _quoted_cells(file: BinaryIO, first: str) -> list[str] | None:
    """The cells of the row that begins with a line, by csv's rules; None where it breaks them.

    A cell goes on over further lines as long as they have no tab: what has one is a row of its own,
    and the mark was no beginning of a quoted cell.
    """

    def lines() -> Iterator[str]:
        yield first + "\n"
        for line in file:
            text = line.decode("utf-8")
            if "\t" in text.partition('"')[0]:
                return
            yield text

    try:
        return next(csv.reader(lines(), delimiter="\t", strict=True))
    except csv.Error:
        return None


# --- JSON -----------------------------------------------------------------------------------------


def _is_json(file: BinaryIO) -> bool:
    """Whether a file begins as JSON does; the file is then where it was."""
    start = file.tell()
    begin = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(start)
    return begin[:1] in (b"[", b"{")


def _json_rows(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    text = file.read().decode("utf-8")
    decode = json.JSONDecoder().raw_decode
    between = re.compile(r"[\s,\ufeff]*")
    place = between.match(text).end()  # type: ignore[union-attr]  # it matches nothing, too
    is_list = text[place : place + 1] == "["
    place = between.match(text, place + is_list).end()  # type: ignore[union-attr]
    offset = len(text[:place].encode())
    number = 0
    while text[place : place + 1] not in ("", "]"):
        try:
            record, end = decode(text, place)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: record {number} is not readable JSON ({error})") from error
        if not isinstance(record, dict):
            raise UsageError(
                f"{path}: record {number} is a {type(record).__name__}, an object was wanted"
            )
        yield offset, _row_of(record)
        next_place = between.match(text, end).end()  # type: ignore[union-attr]
        offset += len(text[place:next_place].encode())
        place = next_place
        number += 1


def _json_row_at(file: BinaryIO, offset: int) -> Row:
    size = 2**20
    while True:
        file.seek(offset)
        begin = file.read(size)
        try:
            return _row_of(json.JSONDecoder().raw_decode(begin.decode("utf-8", "ignore"))[0])
        except ValueError:
            if len(begin) < size:
                raise
            size *= 4


def _row_of(record: Fields) -> Row:
    """A JSON object as a row. EmbSpatial-Bench's own: 'relation' is the category,
    'answer_options' are A to D, and 'answer' counts them from 0."""
    row = {str(name): "" if value is None else str(value) for name, value in record.items()}
    if "relation" in row:
        row.setdefault("category", row["relation"])
    options = record.get("answer_options")
    if isinstance(options, list) and len(options) <= len(LETTERS):
        row |= dict.fromkeys(LETTERS, "") | dict(zip(LETTERS, map(str, options)))
    return row
