"""Where the work runs: items in batches through load() and process(), in this process or as one
shard of several, into a run directory.

    counts = run_items(run, samples, load, process, batch_size=8, shard=(0, 4), num_workers=2)
    return exit_code(counts, run)

Batches are cut from the ordered items before anything is skipped and shards take whole batches, so
an interrupted, sharded or resumed run computes the same batches as one run from start to end. Kept
free of torch: whoever hands out work to other processes (runs.ray_engine) needs none.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from PIL import Image
from tqdm import tqdm

from vlmdiag.cli import UsageError
from vlmdiag.runs import cost
from vlmdiag.runs.inputs import digest_of, known_files
from vlmdiag.runs.progress import Progress
from vlmdiag.types import Record

if TYPE_CHECKING:
    from vlmdiag.runs.disk import Arrays
    from vlmdiag.runs.rundirs import Run

AHEAD = 2**28  # bytes of pictures that wait decoded
# of CUDA; of the CPU allocator on Linux; on Windows
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Item(Protocol):
    """What a run computes: anything with an id that is unique in the run."""

    @property
    def id(self) -> str:
        """Names the item's files."""


AnyItem = TypeVar("AnyItem", bound=Item)
Content = TypeVar("Content")  # what load() makes of an item
Result = tuple[Record, "Arrays"]  # record and arrays of an item
Process = Callable[[list[Content]], Sequence[Result]]
# an item, and what load() made of it or raised
Loaded = tuple[AnyItem, "Content | Exception"]


def run_items(
    run: Run,
    items: Sequence[AnyItem],
    load: Callable[[AnyItem], Content],
    process: Process[Content],
    batch_size: int = 1,
    shard: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    progress: str = "images",
) -> dict[str, int]:
    """Compute the items of this shard that are not done yet. Returns {"done": computed now,
    "skipped": done before, "failed"}, together the shard.

    load(item) gives what process needs, called in num_workers threads (0: in this one) at most a
    few batches ahead. process([loaded, ...]) gives [(record, arrays), ...] in the same order. One
    thread writes. shard (i, n): batches i, i + n, ...

    An exception for one item, in load or in process at batch size 1, is that item's failure; a
    batch that raises is halved where memory ran out (counter oom_halvings) and else taken apart.
    UsageError, a full disk and CUDA errors (after which the process is of no use) end the call;
    what was computed is written first, also on Ctrl-C.
    """
    batches = batches_of(items, batch_size, shard)
    done = done_before(run, [item for batch in batches for item in batch])
    todo = [batch for batch in batches if any(item.id not in done for item in batch)]
    work: Work[AnyItem, Content] = Work(run, process, done, max(map(len, todo), default=1))
    count = sum(map(len, todo))
    started = time.monotonic()
    try:
        with (
            contextlib.closing(_loaded(todo, load, num_workers)) as stream,
            Progress(count, progress) as bar,
        ):
            for batch in stream:
                failed = len(work.failed)
                work.compute_loaded(batch)
                bar.update(len(batch), len(work.failed) - failed)
        work.flush()
    finally:
        work.close()
    counts = {"done": len(work.done), "skipped": len(done), "failed": len(work.failed)}
    seconds = time.monotonic() - started
    cost.note(run, counts["done"], seconds)
    print_counts(counts, progress, count, seconds)
    return counts


def print_counts(counts: Mapping[str, int], progress: str, count: int, seconds: float) -> None:
    """The line at the end of a call that had so many items to go through."""
    print(
        f"{progress}: {counts['done']} computed, {counts['skipped']} done before,"
        f" {counts['failed']} failed, {seconds:.1f} s, {count / max(seconds, 1e-9):.2f} per s",
        flush=True,
    )


def done_before(run: Run, items: Sequence[Item]) -> set[str]:
    """The ids of the items that are finished and can be read; damaged ones are computed again.
    UsageError where one was made of another question, answer or picture than it has now."""
    of_id = {item.id: item for item in items}
    done = run.finished(of_id)
    with known_files(run.known):
        changed = [
            id for id, then in done.items() if then is not None and then != digest_of(of_id[id])
        ]
    run.known.save()
    if changed:
        raise UsageError(
            f"{run.path}: {len(changed)} of its finished items were made of other questions,"
            f" answers or pictures than they have now, such as {changed[0]}; use --overwrite to"
            " start again or another --run_name"
        )
    return set(done)


def exit_code(counts: Mapping[str, int], run: Run | None = None) -> int:
    """0, or 3 with one line that says where the failures are."""
    if not counts["failed"]:
        return 0
    where = run.path / "failures" if run else "failures/ in the run directory"
    print(
        f"{counts['failed']} of {sum(counts.values())} items failed, see {where}; the same command"
        " tries them again",
        flush=True,
    )
    return 3


def batches_of(
    items: Sequence[AnyItem], batch_size: int, shard: tuple[int, int]
) -> list[list[AnyItem]]:
    """The batches of a shard. UsageError where an id occurs twice."""
    items = list(items)
    repeated = [id for id, times in Counter(item.id for item in items).items() if times > 1]
    if repeated:
        raise UsageError(
            f"the id {repeated[0]} occurs more than once among the items ({len(repeated)} such"
            " ids); ids must be unique within a run"
        )
    index, shards = shard
    starts = range(0, len(items), batch_size)
    return [items[start : start + batch_size] for start in starts][index::shards]


class Work(Generic[AnyItem, Content]):
    """Items on their way into the run directory, batch by batch. done_before: ids of those that are
    not written again; batch_size: of the largest batch; writers: threads that write."""

    def __init__(
        self,
        run: Run,
        process: Process[Content],
        done_before: set[str],
        batch_size: int,
        writers: int = 1,
    ) -> None:
        self.run = run
        self.process = process
        self.done_before = done_before
        self.done: set[str] = set()
        self.failed: set[str] = set()
        self._writer = ThreadPoolExecutor(writers, "writer")
        self._pending: deque[Future[bool]] = deque()
        self._most_pending = 2 * batch_size + 2

    def compute_loaded(self, batch: Sequence[Loaded[AnyItem, Content]]) -> None:
        """Compute a batch as load() gave it; items that could not be loaded are failures."""
        loaded = []
        for item, content in batch:
            if isinstance(content, UsageError):
                raise content
            if isinstance(content, Exception):
                self._fail(item, content, "load")
            else:
                loaded.append((item, content))
        if loaded:
            self._compute(loaded)

    def _compute(self, batch: list[tuple[AnyItem, Content]]) -> None:
        """process() a batch, in smaller parts where it does not go through as a whole."""
        if all(item.id in self.done_before for item, _ in batch):
            return
        try:
            results = self.process([value for _, value in batch])
        except UsageError:
            raise
        except Exception as error:
            memory_ran_out = _is_out_of_memory(error)
            if not memory_ran_out and _is_cuda_error(error):
                raise
            if len(batch) == 1:
                self._fail(batch[0][0], error, "process")
                return
        else:
            self._commit(batch, results)
            return
        # Outside the except block, whose exception keeps the failed pass's tensors alive.
        size = 1
        if memory_ran_out:
            self.run.count("oom_halvings")
            tqdm.write(
                f"out of memory at a batch of {len(batch)}: halved; a smaller --batch_size avoids"
                " computing it twice"
            )
            _free_memory()
            size = (len(batch) + 1) // 2
        for start in range(0, len(batch), size):
            self._compute(batch[start : start + size])

    def _commit(self, batch: list[tuple[AnyItem, Content]], results: Sequence[Result]) -> None:
        if len(results) != len(batch):
            raise RuntimeError(f"process() returned {len(results)} results for {len(batch)} items")
        for (item, _), (record, arrays) in zip(batch, results):
            if item.id in self.done_before:
                continue
            self._pending.append(self._writer.submit(self._write, item, record, arrays))
            while self._pending and self._is_due():
                self._pending.popleft().result()  # raises what the writer raised
            self.done.add(item.id)

    def _write(self, item: AnyItem, record: Record, arrays: Arrays) -> bool:
        return self.run.write(item.id, record, arrays, inputs=digest_of(item))

    def _is_due(self) -> bool:
        """Whether the oldest write is over, or too many wait behind it."""
        return self._pending[0].done() or len(self._pending) > self._most_pending

    def _fail(self, item: AnyItem, error: Exception, stage: str) -> None:
        if item.id in self.done_before:
            return
        self.failed.add(item.id)
        image = str(getattr(item, "image", "")) or None
        self.run.fail(item.id, error, stage=stage, image=image)

    def flush(self) -> None:
        """Wait for the writer; raises what it raised."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Finish what is queued."""
        self._writer.shutdown(wait=True)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)


def _is_cuda_error(error: Exception) -> bool:
    """Whether the process is of no use after this error."""
    import torch

    accelerator_error = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator_error) or "CUDA error" in str(error)


def attempt(load: Callable[[AnyItem], Content], item: AnyItem) -> Loaded[AnyItem, Content]:
    """An item and what load() makes of it, or raised."""
    try:
        return item, load(item)
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is this item's failure alone
        return item, error


def picture_bytes(content: object) -> int:
    """What the pictures of an item take; Pillow keeps RGB in four bytes a pixel."""
    if isinstance(content, Image.Image):
        return 4 * content.width * content.height
    return sum(map(picture_bytes, content)) if isinstance(content, tuple) else 0


def _loaded(
    batches: Sequence[Sequence[AnyItem]], load: Callable[[AnyItem], Content], num_workers: int
) -> Generator[list[Loaded[AnyItem, Content]], None, None]:
    """Yield batch after batch, decoded in threads just far enough ahead to keep them busy; of
    batches with large pictures one at a time."""
    if not num_workers:
        for batch in batches:
            yield [attempt(load, item) for item in batch]
        return
    pool = ThreadPoolExecutor(num_workers, "load")
    try:
        waiting: deque[list[Future[Loaded[AnyItem, Content]]]] = deque()
        remaining = iter(batches)
        largest = 0  # of the batches so far, in bytes
        while True:
            while not waiting or (
                (len(waiting) < 2 or sum(map(len, waiting)) < 2 * num_workers)
                and (len(waiting) + 1) * largest <= AHEAD
            ):
                next_batch = next(remaining, None)
                if next_batch is None:
                    break
                waiting.append([pool.submit(attempt, load, item) for item in next_batch])
            if not waiting:
                return
            loaded = [future.result() for future in waiting.popleft()]
            largest = max(largest, sum(picture_bytes(content) for _, content in loaded))
            yield loaded
            del loaded
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
