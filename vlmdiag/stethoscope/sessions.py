"""What the page keeps of its visitors: for how long, in how much memory, and where on the disk.

A visitor is a browser (a cookie that server.py hands out) and one opening of the page in it. What
was asked is kept until nobody looks at it for a while, or until others need its memory; then the
page says so, and the same question works again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vlmdiag.stethoscope.analysis import Analysis, Decoding, Model
from vlmdiag.stethoscope.limits import CLOSED_MINUTES, SESSION_LIMIT

if TYPE_CHECKING:
    Visitor = tuple[str, str]  # a browser's cookie, and one opening of the page in it

KEPT = 3  # analyses of a session
ROOT = "stethoscope-"  # how a server's folder for temporary files begins


class Session:
    """What one visitor has asked."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, Analysis] = OrderedDict()  # the last KEPT ones, by content
        self.current: Analysis | None = None  # the one that is shown
        self.picture: Image.Image | None = None  # the chosen one
        self.origin: int | Path | None = None  # where it came from: an example, an uploaded file
        self.turn = 0  # how many pictures were chosen so far
        self.waiting = ""  # the open panel, where it waits for relevancy
        self.exports: dict[str, Path] = {}  # what can be downloaded, by its secret name
        self.folder: Path | None = None  # of its exports
        self.used = time.monotonic()
        self.is_closed = False  # the page was closed
        self.size = 0  # bytes, when it was last looked at
        self.ended = ""  # why what it had is no longer kept

    def analysis(
        self, model: Model, picture: Image.Image, question: str, decoding: Decoding
    ) -> Analysis:
        """A kept one of the same picture, question and decoding, or a new one; the oldest goes."""
        facts = f"{picture.size}|{question.strip()}|{decoding}".encode()
        digest = hashlib.blake2b(facts + picture.tobytes()).hexdigest()
        analysis = self.kept.pop(digest, None)
        if analysis is None:
            analysis = Analysis(model, picture, question, decoding)
        self.kept[digest] = analysis
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return analysis

    @property
    def is_empty(self) -> bool:
        """Is there nothing that could be let go?"""
        return self.picture is None and self.current is None and not self.kept

    def keep_current(self) -> None:
        """Let the analyses go that are not shown."""
        for digest in [digest for digest, kept in self.kept.items() if kept is not self.current]:
            del self.kept[digest]

    def end(self, why: str) -> None:
        """Let everything go but where the picture came from."""
        had = not self.is_empty
        self.kept.clear()
        self.current = self.picture = None
        self.exports.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None
        self.size = 0
        if had:
            self.ended = why


class Sessions:
    """All sessions. minutes: how long one is kept after its last use; memory: bytes that all of
    them may take. The one that was not used for longest goes first, and never one that is at
    work."""

    def __init__(self, minutes: float, memory: int, root: Path) -> None:
        self.minutes = minutes
        self.memory = memory
        self.root = root
        self._sessions: OrderedDict[Visitor, Session] = OrderedDict()  # the last used at the end
        self._busy: dict[Visitor, int] = {}  # events of each that are at work
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def at(self, visitor: Visitor) -> Iterator[Session]:
        """A visitor's session while something is done with it."""
        with self._lock:
            session = self._sessions.setdefault(visitor, Session())
            self._busy[visitor] = self._busy.get(visitor, 0) + 1
            self._touch(visitor)
        try:
            yield session
        finally:
            if size_of(session) > self.memory:
                session.keep_current()
            size = 0 if session.is_empty else size_of(session)
            with self._lock:
                session.size = size
                self._touch(visitor)
                self._busy[visitor] -= 1
                if not self._busy[visitor]:
                    del self._busy[visitor]
            self.sweep()

    def _touch(self, visitor: Visitor) -> None:
        session = self._sessions[visitor]
        session.used = time.monotonic()
        session.is_closed = False
        self._sessions.move_to_end(visitor)

    def close(self, visitor: Visitor) -> None:
        """A visitor has closed the page: what was kept goes soon, unless the page is still there
        after all, as when a network fails for a moment."""
        with self._lock:
            if visitor in self._sessions:
                self._sessions[visitor].is_closed = True

    def sweep(self) -> None:
        """Let go of what is too old, and of the longest unused while there is too much."""
        now = time.monotonic()
        with self._lock:
            total = sum(session.size for session in self._sessions.values())
            latest = next(reversed(self._sessions), None)
            empty = []
            for visitor in [visitor for visitor in self._sessions if visitor not in self._busy]:
                session = self._sessions[visitor]
                size = session.size
                minutes = min(self.minutes, CLOSED_MINUTES) if session.is_closed else self.minutes
                if now - session.used > 60 * minutes:
                    session.end(f"nothing was done here for {minutes:g} minutes")
                elif total > self.memory and size and visitor != latest:
                    session.end("other visitors needed the memory")
                total -= size - session.size
                if not session.size:
                    empty.append(visitor)
            # what is only known, and holds nothing, puts nobody else out
            for visitor in empty[: max(0, len(self._sessions) - SESSION_LIMIT)]:
                del self._sessions[visitor]

    def exported(self, cookie: str, name: str) -> Path | None:
        """The file of a secret name, for the browser that it was made for."""
        with self._lock:
            for (owner, _), session in self._sessions.items():
                if name in session.exports and secrets.compare_digest(owner, cookie):
                    return session.exports[name]
        return None

    def new_folder(self, session: Session) -> Path:
        """An empty folder for an export, which goes with the session. What was exported before
        goes now."""
        if session.folder is not None:
            shutil.rmtree(session.folder, ignore_errors=True)
        session.exports.clear()
        session.folder = Path(tempfile.mkdtemp(prefix="export-", dir=self.root))
        return session.folder


def size_of(value: object, seen: set[int] | None = None) -> int:
    """Bytes of the arrays, tensors, pictures and texts that a value holds, the model left out."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, Model | torch.nn.Module | type):
        return 0
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        known = storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        return 0 if known else storage.nbytes()
    if isinstance(value, Image.Image):
        return value.width * value.height * len(value.getbands())
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(size_of(part, seen) for part in (*list(value), *list(value.values())))
    if isinstance(value, list | tuple | set):
        return sum(size_of(part, seen) for part in list(value))
    return size_of(vars(value), seen) if hasattr(value, "__dict__") else 0


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for the server's temporary files, for this user's eyes only, removed at the end.
    Those of servers that were killed are removed first: nobody holds their lock any more."""
    base = Path(tempfile.gettempdir())
    for old in base.glob(f"{ROOT}*"):
        with contextlib.suppress(OSError), open(old / "lock", "r+b") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    root = Path(tempfile.mkdtemp(prefix=ROOT, dir=base))  # mode 700
    try:
        with open(root / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def sweeping(sessions: Sessions, seconds: float) -> threading.Thread:
    """A thread that lets old sessions go, also while nobody does anything."""

    def sweep_for_ever() -> None:
        while True:
            time.sleep(seconds)
            sessions.sweep()

    thread = threading.Thread(target=sweep_for_ever, daemon=True)
    thread.start()
    return thread
