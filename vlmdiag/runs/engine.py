"""Where the work runs: items in batches through load() and process(), in this process or as one
shard of several, into a run directory.

    counts = run_items(run, samples, load, process, batch_size=8, shard=(0, 4), num_workers=2)
    return exit_code(counts, run)

Batches are cut from the ordered items before anything is skipped and shards take whole batches, so
an interrupted, sharded or resumed run computes the same batches as one run from start to end."""

import contextlib
import gc
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from vlmdiag.cli import UsageError

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
)  # CUDA; the CPU allocator on Linux; on Windows


def run_items(
    run, items, load, process, batch_size=1, shard=(0, 1), num_workers=0, progress="images"
):
    """Compute the items of this shard that are not done yet. Returns {"done": computed now,
    "skipped": done before, "failed"}, together the shard.

    items: ordered, each with a unique `.id`. load(item) -> what process needs, called in
    num_workers threads (0: in this one) at most a few batches ahead. process([loaded, ...]) ->
    [(record, arrays), ...] in the same order. One thread writes. shard (i, n): batches i, i + n,
    ...

    An exception for one item, in load or in process at batch size 1, is that item's failure; a
    batch that raises is halved where memory ran out (counter oom_halvings) and else taken apart.
    UsageError, a full disk and CUDA errors (after which the process is of no use) end the call;
    what was computed is written first, also on Ctrl-C."""
    items = list(items)
    repeated = [id for id, seen in _counted(item.id for item in items) if seen == 2]
    if repeated:
        raise UsageError(
            f"the id {repeated[0]} occurs more than once among the items ({len(repeated)} such"
            " ids); ids must be unique within a run"
        )
    index, count = shard
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)][
        index::count
    ]
    before = {item.id for batch in batches for item in batch if run.is_done(item.id)}
    batches = [batch for batch in batches if any(item.id not in before for item in batch)]
    done, failed, started = set(), set(), time.monotonic()

    def fail(item, error, stage):
        if item.id not in before:
            failed.add(item.id)
            run.fail(item.id, error, stage=stage, image=str(getattr(item, "image", "")) or None)

    def compute(batch):
        """process() a list of (item, loaded), in smaller parts where it does not go through."""
        if all(item.id in before for item, _ in batch):
            return
        try:
            results = process([loaded for _, loaded in batch])
        except UsageError:
            raise
        except Exception as error:
            short = _out_of_memory(error)
            if not short and (
                isinstance(error, getattr(torch, "AcceleratorError", ()))
                or "CUDA error" in str(error)
            ):
                raise
            if len(batch) == 1:
                return fail(batch[0][0], error, "process")
        else:
            if len(results) != len(batch):
                raise RuntimeError(
                    f"process() returned {len(results)} results for {len(batch)} items"
                )
            for (item, _), (record, arrays) in zip(batch, results):
                if item.id not in before:
                    write(item.id, record, arrays)
                    done.add(item.id)
            return
        # outside the except block, whose exception keeps the failed pass's tensors alive
        if short:
            run.count("oom_halvings")
            tqdm.write(
                f"out of memory at a batch of {len(batch)}: halved; a smaller --batch_size avoids"
                " computing it twice"
            )
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        step = (len(batch) + 1) // 2 if short else 1
        for start in range(0, len(batch), step):
            compute(batch[start : start + step])

    pending = deque()

    def write(*item):
        pending.append(writer.submit(run.write, *item))
        while pending and (pending[0].done() or len(pending) > 2 * batch_size + 2):
            pending.popleft().result()  # raises what the writer raised

    writer = ThreadPoolExecutor(1, "writer")
    todo = sum(map(len, batches))
    try:
        with (
            contextlib.closing(_loaded(batches, load, num_workers)) as stream,
            tqdm(total=todo, desc=progress, unit="image", disable=None) as bar,
        ):
            for batch in stream:
                for item, _, error in batch:
                    if isinstance(error, UsageError):
                        raise error
                    if error is not None:
                        fail(item, error, "load")
                loaded = [(item, value) for item, value, error in batch if error is None]
                if loaded:
                    compute(loaded)
                bar.update(len(batch))
        while pending:
            pending.popleft().result()
    finally:
        writer.shutdown(wait=True)  # finishes what is queued
    counts = {"done": len(done), "skipped": len(before), "failed": len(failed)}
    seconds = time.monotonic() - started
    rate = todo / max(seconds, 1e-9)
    print(
        f"{progress}: {len(done)} computed, {len(before)} done before, {len(failed)} failed,"
        f" {seconds:.1f} s, {rate:.2f} per s",
        flush=True,
    )
    return counts


def exit_code(counts, run=None):
    """0, or 3 with one line that says where the failures are."""
    if not counts["failed"]:
        return 0
    where = f"{run.path / 'failures'}" if run else "failures/ in the run directory"
    print(
        f"{counts['failed']} of {sum(counts.values())} items failed, see {where}; the same command"
        " tries them again",
        flush=True,
    )
    return 3


def _counted(ids):
    """Yield (id, how often it has occurred so far)."""
    seen = {}
    for id in ids:
        seen[id] = seen.get(id, 0) + 1
        yield id, seen[id]


def _out_of_memory(error):
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in OUT_OF_MEMORY
    )


def _attempt(load, item):
    try:
        return item, load(item), None
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is the failure of this item alone
        return item, None, error


def _loaded(batches, load, num_workers):
    """Yield batch after batch as [(item, loaded, error), ...], decoded in threads just far enough
    ahead to keep them busy."""
    if not num_workers:
        for batch in batches:
            yield [_attempt(load, item) for item in batch]
        return
    pool = ThreadPoolExecutor(num_workers, "load")
    try:
        waiting, remaining = deque(), iter(batches)
        while True:
            while len(waiting) < 2 or sum(map(len, waiting)) < 2 * num_workers:
                batch = next(remaining, None)
                if batch is None:
                    break
                waiting.append([pool.submit(_attempt, load, item) for item in batch])
            if not waiting:
                return
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
