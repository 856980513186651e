"""Who may remove or make a file, where several machines share a folder.

A shared file system need not have hard links, shows what another machine made up to a minute late,
and keeps its own time; containers on one machine can have one host name and the same process ids.
So neither a process id nor a host name nor our clock says whether the owner of a file still works.
What does:

- *A temporary file is its own lease.* Its name holds a random token, it is created exclusively
  (O_EXCL, which a server decides, also NFS from version 3 on), and as long as its owner works on it
  a heartbeat renews its time every BEAT seconds.
- *A lease is dead when somebody saw it unchanged for PERIOD seconds by his own monotonic clock.* No
  two clocks are compared. The look opens the file, which makes NFS ask the server; PERIOD is the
  longest that its caches keep names and attributes by default, and six beats.
- *Or when it is AGE seconds older than a file just made beside it*, both by the clock of the
  server. For a process that ends before PERIOD is over; AGE is far more than a clock is off while
  two files are written, and than a network is away. An owner that was stopped for so long finds its
  file gone and makes it again (disk.write) or says so.
- *To make a file once* (publish) is to create it exclusively, empty, and then to rename the whole
  content over it. Of several makers the server lets one be first; all others wait for the content.
  Where the first one died in between, the empty file is a dead lease by the rule above. Who
  succeeds it is decided in the same way: by creating .<name>.1.lease exclusively, after a further
  death .<name>.2.lease and so on, and by looking once more before the renaming.

Kept free of torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

BEAT = 10.0  # seconds between two renewals of a lease
PERIOD = 60.0  # seconds unchanged, by the observer's clock, after which a lease is dead
AGE = 3600.0  # seconds by the server's clock after which it is, whoever looks
POLL = 0.05  # seconds between two looks at what another one makes, growing to a second
SAID = 3.0  # seconds of waiting that are not worth a line

# .<name>.<token>.tmp; of versions before leases .<name>.<host>.<pid>-<n>.tmp
TEMPORARY = re.compile(r"\..+\.([0-9a-f]{16}|[^.]+\.\d+-\d+)\.tmp|\..+\.\d+\.lease", re.DOTALL)
PROBE = ".now."  # begins the name of a file made to read the server's clock: nobody needs it after

# of a file that is not there, or that was replaced on another machine while it was opened
NOT_THERE = {errno.ENOENT, getattr(errno, "ESTALE", errno.ENOENT)}

State = tuple[int, int, int] | None

_held: set[Path] = set()  # temporary files of this process that are being written
_beating: threading.Thread | None = None
_swept: set[Path] = set()  # folders, once in a process
_suspects: dict[Path, tuple[State, float]] = {}  # what was left there, and since when it is so
_lock = threading.Lock()


# --- temporary files ------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary(path: Path, name: str) -> Iterator[Path]:
    """An empty temporary file in the folder of path, of this process until the end of the context,
    where it is removed if it is still there. Leftovers of dead processes there are swept.

    name: the readable part of its name. OSError where it cannot be made.
    """
    file = path.with_name(f".{name}.{secrets.token_hex(8)}.tmp")
    with open(file, "xb") as created:
        now = os.fstat(created.fileno()).st_mtime
    hold(file)
    try:
        if file.parent not in _swept:
            _swept.add(file.parent)
            _sweep(file.parent, now)
        elif _suspects:
            _sweep_suspects()
        yield file
    finally:
        with _lock:
            _held.discard(file)
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def hold(file: Path) -> None:
    """Renew the time of a file as long as it is held."""
    global _beating
    with _lock:
        _held.add(file)
        if _beating is None:
            _beating = threading.Thread(target=_beat, name="leases", daemon=True)
            _beating.start()


def _beat() -> None:
    while True:
        time.sleep(BEAT)
        with _lock:
            files = list(_held)
        for file in files:
            with contextlib.suppress(OSError):
                os.utime(file)  # to the server's time


def _forget() -> None:
    """In a fork: the thread that beats is the parent's, and so are the files."""
    global _beating, _lock
    _beating, _lock = None, threading.Lock()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# --- what is dead ---------------------------------------------------------------------------------


def look(path: Path) -> State:
    """Inode, size and time of a file, as the server has them; None where it is not there. OSError
    where it cannot be opened."""
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def is_empty(path: Path) -> bool:
    """Whether a file is not there, or empty: being made, or left so by a process that died."""
    state = look(path)
    return state is None or state[1] == 0


def sweep(folder: Path) -> None:
    """Remove the temporary files of a folder that are dead by age, and suspect the others: this
    process removes them later, if it lives to see that nobody renews them. OSError where the folder
    cannot be written."""
    _swept.add(folder)
    probe = folder / f"{PROBE}{secrets.token_hex(8)}.tmp"
    with open(probe, "xb") as created:
        now = os.fstat(created.fileno()).st_mtime
    probe.unlink(missing_ok=True)
    _sweep(folder, now)


def _sweep(folder: Path, now: float) -> None:
    """now: the time of a file just made there."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not TEMPORARY.fullmatch(entry.name):
                continue
            file = Path(entry.path)
            with contextlib.suppress(OSError):
                if entry.name.startswith(PROBE) or now - entry.stat().st_mtime > AGE:
                    file.unlink()
                elif file not in _held:
                    _suspects[file] = (look(file), time.monotonic())


def _sweep_suspects() -> None:
    """Remove suspects that did not change for a period."""
    now = time.monotonic()
    for file, (state, since) in list(_suspects.items()):
        if now - since < PERIOD:
            continue
        with contextlib.suppress(OSError):
            current = look(file)
            if current is not None and current != state:
                _suspects[file] = (current, now)
                continue
            file.unlink(missing_ok=True)
        _suspects.pop(file, None)


def wait_until(is_there: Callable[[], bool], *watched: Path) -> bool:
    """Wait for what another process makes: True as soon as is_there(), False where none of the
    watched files changed for a period."""
    pause, state, is_said = POLL, None, False
    started = since = time.monotonic()
    while not is_there():
        now, current = time.monotonic(), [look(path) for path in watched]
        if current != state:
            state, since = current, now
        elif now - since >= PERIOD:
            return False
        if now - started > SAID and not is_said:
            is_said = True
            print(f"waiting for {watched[0]}, which another process makes or was killed making")
        time.sleep(pause)
        pause = min(1.0, 1.2 * pause)
    return True


# --- files made once ------------------------------------------------------------------------------


def is_missing(path: Path) -> bool:
    """Whether a file is not there, by the word of the server: what another machine made a moment
    ago may not be seen yet. OSError where its folder cannot be written."""
    try:
        open(path, "xb").close()
    except FileExistsError:
        return False
    path.unlink(missing_ok=True)
    return True


def publish(whole: Path, path: Path) -> bool:
    """Rename a finished file to path unless something is there already; whether that was done. Of
    several processes that do so at once exactly one does, without hard links too; then the others
    find the content at path. OSError where it cannot be written."""
    generation, mine = 0, path
    while is_empty(path):
        try:
            open(mine, "xb").close()
        except FileExistsError:
            if not wait_until(lambda: not is_empty(path), path, mine):
                generation += 1
                mine = path.with_name(f".{path.name}.{generation}.lease")
            continue
        is_first = generation == 0 or is_empty(path)
        if is_first:
            os.replace(whole, path)
        for older in range(1, generation + 1):
            path.with_name(f".{path.name}.{older}.lease").unlink(missing_ok=True)
        return is_first
    return False
