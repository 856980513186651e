"""What an image processor makes of a picture, made once for all prompts about it.

    inputs = once(vlm.processor)(images=image, text=first, return_tensors="pt")
    inputs = once(vlm.processor)(images=image, text=second, return_tensors="pt")  # text alone

A picture is known by its pixels and a processor by its settings, so that either may be changed in
its place and models with equal processors look at a picture once. What was made of a picture is
kept as long as that is there.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from transformers import ImageProcessingMixin

if TYPE_CHECKING:
    from transformers import ProcessorMixin

LARGE = 2**26  # bytes of tensors that are made again rather than kept

Made = Mapping[str, object]
Key = tuple[object, ...]
# who made it (and stays, so that its address is no other's), of which pictures, and what it is
_kept: dict[Key, tuple[Callable[..., Made], list[weakref.ref[Image]], Made]] = {}


def once(processor: ProcessorMixin) -> ProcessorMixin:
    """A copy of the processor that looks at no picture twice; one without an image processor of its
    own as it is."""
    inner = getattr(processor, "image_processor", None)
    if inner is None:
        return processor
    processor = copy.copy(processor)
    processor.image_processor = _Once(inner)
    return processor


class _Once:
    """An image processor that returns what it returned for the same pictures before."""

    def __init__(self, inner: Callable[..., Made]) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def __call__(self, images: object = None, **options: Any) -> Made:
        pictures = [leaf for leaf in _leaves(images) if isinstance(leaf, Image)]
        is_known = all(picture.mode == "RGB" for picture in pictures)
        if not pictures or not is_known or len(pictures) < len(list(_leaves(images))):
            return self._inner(images, **options)
        settings = repr((sorted(options.items()), getattr(self._inner, "__dict__", None)))
        # transformers' own of one class differ in nothing but their settings
        is_theirs = isinstance(self._inner, ImageProcessingMixin)
        maker = type(self._inner) if is_theirs else id(self._inner)
        key: Key = (maker, settings, _digests(images))
        known = _kept.get(key)
        if known is None:
            made = self._inner(images, **options)
            if sum(value.nbytes for value in made.values() if torch.is_tensor(value)) > LARGE:
                return made
            alive = [weakref.ref(picture, lambda _: _kept.pop(key, None)) for picture in pictures]
            known = _kept[key] = (self._inner, alive, made)
        return _copied(known[2])


def _leaves(images: object) -> Iterator[object]:
    """The pictures of a list of lists, in order."""
    if isinstance(images, (list, tuple)):
        for part in images:
            yield from _leaves(part)
    else:
        yield images


def _digests(images: object) -> object:
    """Lists of lists with the size and the digest of each picture in its place."""
    if isinstance(images, Image):
        return images.size, hashlib.blake2b(images.tobytes()).digest()
    assert isinstance(images, (list, tuple))
    return tuple(_digests(part) for part in images)


def _copied(made: Made) -> Made:
    """What a processor may take apart; tensors are the same."""
    copied = copy.copy(made)
    for name, value in made.items():
        if isinstance(value, list):
            copied[name] = list(value)  # type: ignore[index]
    return copied
