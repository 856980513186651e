"""What a run cost: time of its calls and memory of their processes, as counters of the run.

items_measured, milliseconds: sums over all processes, loading the model left out; peak_mib,
peak_gpu_mib: the largest of any process, in MiB, the model included. draft_tokens, draft_agreed,
draft_passes, draft_near_ties: see vlmdiag.model.drafts. Kept free of torch.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from vlmdiag.cli import UsageError

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Run


def note(run: Run, items: int, seconds: float) -> None:
    """Add what computing so many items took; nothing for none, and nothing on a full disk, where
    what was measured matters more."""
    if not items:
        return
    counted = {
        "items_measured": items,
        "milliseconds": round(1000 * seconds),
        "peak_mib": _resident(),
        "peak_gpu_mib": _on_gpu(),
        **_of_drafts(),
    }
    with contextlib.suppress(UsageError):
        for key, value in counted.items():
            if value:
                run.count(key, value)


def _resident() -> int:
    """Most memory that this process ever had, in MiB; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def _of_drafts() -> dict[str, int]:
    """What was decoded with drafts since the last note."""
    drafts = sys.modules.get("vlmdiag.model.drafts")
    return {} if drafts is None else dict(drafts.counted())


def _on_gpu() -> int:
    """Most memory that tensors of this process ever had on GPUs, in MiB."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.max_memory_allocated(device) for device in devices) >> 20
