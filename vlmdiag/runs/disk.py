"""Files written in one step, and read with an error that names them.

Bytes go to a temporary name in the same folder, are flushed to the disk and renamed, so a process
may be killed at any point and no reader sees half a file. Kept free of torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import platform
import struct
import time
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from vlmdiag.cli import UsageError
from vlmdiag.types import Record

HOST = platform.node().split(".")[0] or "host"
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
DAY = 86_400.0  # seconds after which a temporary file belongs to nobody
# a file of a run that is larger was not written by us: its content as JSON, its arrays in memory
JSON_LIMIT = 2**28
NPZ_LIMIT = 2**31
NAME_LIMIT = 150  # bytes of a name that a temporary one holds; file systems take 255
# what reading a damaged NPZ raises, also one that is encrypted, lies about its sizes or has no
# header; the last two: an .npy where an NPZ was wanted
BROKEN = (
    MemoryError,
    OverflowError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    OSError,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    TypeError,
)
Arrays = Mapping[str, "np.ndarray"]
_numbers = itertools.count()
_swept: set[Path] = set()  # folders, once in a process


# --- writing --------------------------------------------------------------------------------------


def temporary_name(path: Path) -> Path:
    """A name of its own in the folder of path, which sweep() knows: .<name>.<host>.<pid>-<n>.tmp,
    of a long name a digest. The first one in a folder sweeps it."""
    if path.parent not in _swept:
        _swept.add(path.parent)
        sweep(path.parent)
    name = path.name
    if len(name.encode("utf-8", "replace")) > NAME_LIMIT:
        name = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
    return path.with_name(f".{name}.{HOST}.{os.getpid()}-{next(_numbers)}.tmp")


@contextlib.contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end of the context it is flushed and becomes path.

    With an exception nothing is left behind and path stays as it was. UsageError where the file
    cannot be written.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> UsageError:
    """The line for a file that cannot be written, which says if the disk is full."""
    is_full = error.errno in FULL
    what = "the disk is full or a size limit is reached" if is_full else "cannot write"
    return UsageError(
        f"{what} ({error.strerror or error}): {path}; nothing already computed is lost, the same"
        " command goes on from there"
    )


def write(path: Path, data: bytes) -> None:
    """Put bytes at path, whose folder is there. UsageError where that cannot be."""
    with in_one_step(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_once(path: Path, data: bytes) -> bool:
    """Put bytes at path only if nothing is there yet; whether they were written. Of several
    processes that do so at once exactly one does."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = _link(temporary, path)
        _flush_folder(path.parent)
        return written
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links: exclusive creation, whose reader may see the file before
        # its bytes (rundirs waits for them).
        try:
            with open(path, "xb", buffering=0) as file:
                file.write(temporary.read_bytes())
        except FileExistsError:
            return False
    return True


def _flush_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system knows how: a file that was renamed may
    else be gone after a power cut."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """The folder of a file, with those above it. UsageError where it cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def out_folder(path: str | Path) -> Path:
    """A folder for results, made where it is not there. UsageError where it cannot be, before
    anything is computed for it."""
    folder = Path(path)
    make_folder(folder / "file")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write to {folder}: permission denied")
    return folder


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes, with the folder. UsageError where that cannot be."""
    make_folder(Path(path))
    write(Path(path), data)


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file, with its folder. UsageError where that cannot be."""
    write_bytes(path, json_bytes(value))


def write_npz(path: str | Path, arrays: Arrays) -> None:
    """Write an NPZ file, with its folder; equal arrays give equal bytes. UsageError where that
    cannot be."""
    write_bytes(path, npz_bytes(arrays))


# --- contents -------------------------------------------------------------------------------------


def plain(value: object) -> object:
    """What JSON can hold: numpy to python, paths to text, NaN and infinities to null."""
    if isinstance(value, dict):
        return {
            key.item() if isinstance(key, np.generic) else key: plain(item)
            for key, item in value.items()
        }
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def json_bytes(value: object) -> bytes:
    """A value as the text of a JSON file."""
    text = json.dumps(plain(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    # a lone surrogate becomes its \uXXXX escape, which JSON reads back
    return text.encode("utf-8", "backslashreplace")


def npz_bytes(arrays: Arrays, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Bytes of an NPZ file: equal arrays give equal bytes, because every member carries the same
    date (np.savez promises none)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
            date = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            archive.writestr(date, member.getvalue(), compression)
    return buffer.getvalue()


# --- reading --------------------------------------------------------------------------------------

AGAIN = "delete it and run the command that made it again"


def read_json(path: Path, advice: str = AGAIN) -> Record:
    """The object of a JSON file. UsageError names a file that cannot be read or holds none."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise ValueError(f"it has more than {JSON_LIMIT // 2**20} MiB")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"{path} cannot be read ({reason}); {advice}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UsageError(f"{path} holds a {kind} where an object was wanted; {advice}")
    return value


def read_npz(path: Path, keys: Sequence[str] | None = None) -> dict[str, np.ndarray] | None:
    """Arrays of an NPZ file, all or the named ones; None if it lacks one of those. UsageError names
    a file that cannot be read."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            names = archive.files if keys is None else keys
            if not set(names) <= set(archive.files):
                return None
            check_size(archive, names)
            return {name: archive[name] for name in names}
    except BROKEN as error:
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}: {error}); {AGAIN}"
        ) from error


def check_size(archive: NpzFile, names: Sequence[str]) -> None:
    """ValueError where the named arrays would take more than NPZ_LIMIT bytes."""
    assert archive.zip is not None  # it is open
    members = {info.filename.removesuffix(".npy"): info for info in archive.zip.infolist()}
    size = sum(members[name].file_size for name in names if name in members)
    if size > NPZ_LIMIT:
        raise ValueError(
            f"its arrays take {size / 2**30:.1f} GiB, at most {NPZ_LIMIT / 2**30:.0f} GiB are read"
        )


def looks_whole(path: Path, begins: bytes, ends: bytes, behind: int = 0) -> bool:
    """Whether a file begins and ends as its kind does: false for one that is missing, empty, cut
    short or filled up with zeros. behind: bytes that may follow `ends`."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            first = file.read(len(begins))
            file.seek(max(0, size - len(ends) - behind))
            return first == begins and file.read(len(ends)) == ends
    except OSError:
        return False


def check_npz(path: Path) -> None:
    """ValueError and the like (BROKEN) for an NPZ of which a member's checksum is wrong."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} is damaged")


# --- leftovers ------------------------------------------------------------------------------------


def sweep(folder: Path) -> None:
    """Remove temporary files that killed processes left: of this machine and not running any more,
    or a day old."""
    for temporary in folder.glob(".*.tmp"):
        if temporary.name.count(".") < 4:  # not of temporary_name()
            continue
        _, host, process, _ = temporary.name.rsplit(".", 3)
        with contextlib.suppress(OSError):
            is_old = time.time() - temporary.stat().st_mtime > DAY
            is_orphan = host == HOST and not _is_running(process.split("-")[0])
            if is_old or is_orphan:
                temporary.unlink()


def _is_running(pid: str) -> bool:
    if os.name != "posix" or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True
