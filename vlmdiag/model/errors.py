"""Any error of a checkpoint as one line."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from vlmdiag.cli import UsageError

# errors whose messages say what is wrong
CLEAR_ERRORS = (OSError, ValueError, ImportError, RuntimeError, StrictDataclassError)


@contextlib.contextmanager
def as_usage_error(
    path: str | Path,
    what: str = "cannot be loaded",
    explain: Callable[[], str | None] | None = None,
    advice: str = "",
) -> Iterator[None]:
    """Within the context an error of any kind becomes a UsageError in one line: a checkpoint can be
    wrong in more ways than can be listed. explain() may say what the checkpoint is; `advice`
    follows the reason where it does not. The traceback is logged at the level DEBUG."""
    try:
        yield
    except (UsageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        logging.getLogger(__name__).debug("%s: %s", path, what, exc_info=True)
        reason = _reason(error)
        form = explain() if explain else None
        said = f"{form} ({reason[:200]})" if form else f"{reason}{advice}"
        raise UsageError(f"{path}: {what}: {said}") from error


def _reason(error: BaseException) -> str:
    """An error's message on one line; its type and where it arose too, where a message such as
    'list index out of range' says nothing without them."""
    message = " ".join(str(error).split())[:400]
    if isinstance(error, CLEAR_ERRORS) and message:
        return message
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename)
    where = f"{file.parent.name}/{file.name}".removeprefix("/")
    return f"{type(error).__name__}: {message} (in {where})"
