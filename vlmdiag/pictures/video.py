"""A video as a list of frames, by PyAV, an optional package (the extra `video`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdiag.cli import UsageError

if TYPE_CHECKING:
    from av.container import InputContainer
    from PIL.Image import Image


@dataclass(frozen=True)
class Frame:
    """A frame of a video, counted from 0 in the order in which they are shown."""

    video: Path
    index: int

    @property
    def name(self) -> str:
        """clip.mp4#12"""
        return f"{self.video.name}#{self.index}"

    def __str__(self) -> str:
        return f"{self.video}#{self.index}"


def frames_of(path: str | Path, count: int) -> list[Frame]:
    """`count` frames of a video at equal distances from its first one on, as transformers samples
    them: frame i * n / count of n. UsageError: no PyAV, no video, fewer frames."""
    with _opened(path) as container:
        total = sum(1 for _ in container.decode(video=0))
    if not 1 <= count <= total:
        raise UsageError(f"--frames {count}: {path} has {total} frames")
    return [Frame(Path(path), i * total // count) for i in range(count)]


def read_frames(path: str | Path, indices: Sequence[int]) -> dict[int, Image]:
    """{index: RGB picture} of some frames, decoded up to the last of them. UsageError: see
    frames_of()."""
    wanted = set(indices)
    found = {}
    with _opened(path) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                # upright, as players show it
                found[index] = frame.to_image().rotate(frame.rotation, expand=True)
            if len(found) == len(wanted):
                return found
    raise UsageError(f"{path} has no frame {max(wanted)}")


@contextmanager
def _opened(path: str | Path) -> Iterator[InputContainer]:
    """A video that is open; what goes wrong with it in one line."""
    try:
        import av
    except ImportError as error:
        raise UsageError(
            f"{path}: videos need PyAV, which is not installed: pip install av, or this package"
            " with its extra [video]"
        ) from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UsageError(f"{path} has no video stream")
            yield container
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (av.FFmpegError, OSError) as error:
        raise UsageError(f"{path} is not a readable video ({error})") from error
