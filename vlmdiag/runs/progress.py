"""How far a loop is: a bar on a terminal; in a log, which keeps every line, one line a minute.

    with Progress(len(items), "images") as progress:
        progress.update(8, failed=1)

A line says how much is done, the rate of the last ten minutes, what failed, and about how long the
rest takes at that rate. Both go to the standard error.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType

from tqdm import tqdm

EVERY = 60.0  # seconds between two lines
WINDOW = 10  # lines that a rate is taken over


class Progress:
    """See above. total: how many there are; word: what they are, in the plural."""

    def __init__(self, total: int, word: str) -> None:
        self.total = total
        self.word = word
        self.done = 0
        self.failed = 0
        # None: not where the output is no terminal
        self._bar = tqdm(total=total, desc=word, unit="image", disable=None)
        # (time, done) at the start and at each line
        self._marks = deque([(time.monotonic(), 0)], maxlen=WINDOW + 1)

    def update(self, count: int, failed: int = 0) -> None:
        """So many more are done, `failed` of them without a result."""
        self.done += count
        self.failed += failed
        if not self._bar.disable:
            if self.failed:
                self._bar.set_postfix(failed=self.failed, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._marks[-1][0] >= EVERY:
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        now = time.monotonic()
        since, before = self._marks[0]
        self._marks.append((now, self.done))
        rate = (self.done - before) / (now - since)
        left = f"{_duration((self.total - self.done) / rate)} left" if rate else "standing still"
        pace = f"{rate:.2f} per s" if rate >= 0.1 else f"{60 * rate:.2f} per min"
        share = self.done / max(self.total, 1)
        return (
            f"{self.word}: {self.done} of {self.total} ({share:.1%}), {self.failed} failed, {pace},"
            f" {left}"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


def _duration(seconds: float) -> str:
    """'12 s', '3 min', '7 h 40 min', '2 d 5 h'."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 47.5:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{round(hours) // 24} d {round(hours) % 24} h"
