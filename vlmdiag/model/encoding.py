"""From a sample to a batch: the tokens of its prompt and their groups, padded on the left.

Groups come from token ids and from tokenizer offsets in the rendered prompt, never from counting:
each token is asked which characters of the prompt it stands for, and the prompt knows where its
system prompt and its question are.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from vlmdiag.batch import Batch, joined
from vlmdiag.cli import UsageError
from vlmdiag.families.generic import seeing
from vlmdiag.groups import GROUPS, PAD, VISION
from vlmdiag.model.limits import check_lengths, check_scaled
from vlmdiag.model.prompts import Rendered, Span, prompt_for
from vlmdiag.pictures.deferred import let_go

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.pictures.samples import Sample
    from vlmdiag.types import VLM


def never_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    """Forget a truncation or padding that was saved with a tokenizer: its processor would cut
    prompts by it. Batches are padded here, see encode()."""
    for name in ("max_length", "truncation", "truncation_strategy", "stride", "padding"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.init_kwargs.pop("pad_to_multiple_of", None)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


# --- special strings in a question ----------------------------------------------------------------


@dataclass
class _Hidden:
    """A prompt in whose question every special string is one character that stands for it."""

    text: str
    system: Span | None
    question: Span
    stand_in: str
    typed: list[str]  # the special strings, in order

    @property
    def places(self) -> list[int]:
        """Characters of the text that stand for special strings."""
        start, end = self.question
        return [i for i in range(start, end) if self.text[i] == self.stand_in]


def _specials(vlm: VLM, rendered: Rendered) -> list[str]:
    """Strings that mean something besides their letters, longest first: the tokenizer's special
    tokens, what stands for the picture, and the marks with which the prompt itself is built. Other
    added tokens, a fine-tune's own words or runs of blanks, are ordinary vocabulary."""
    start, end = rendered.question
    around = rendered.text[:start] + rendered.text[end:]
    names = {str(token) for token in vlm.tokenizer.all_special_tokens} | set(vlm.family.markup)
    names.add(getattr(vlm.processor, "image_token", None) or "")
    for token in vlm.tokenizer.added_tokens_decoder.values():
        name = token.content.strip()
        is_mark = not name.isalnum() and name in around
        if token.special or (name and is_mark):
            names.add(token.content)
    return sorted(filter(None, names), key=len, reverse=True)


def _hide_typed_specials(vlm: VLM, rendered: Rendered) -> _Hidden:
    """Special strings that a person typed, such as </s>, must stay text: hide them from the
    tokenizer; _put_back() tokenizes them as text."""
    start, end = rendered.question
    specials = _specials(vlm, rendered)
    stand_in = next(chr(code) for code in range(0xE020, 0xF8FF) if chr(code) not in rendered.text)
    question = ""
    typed = []
    remaining = rendered.text[start:end]
    while remaining:
        special = next((name for name in specials if remaining.startswith(name)), None)
        if special is None:
            question += remaining[0]
            remaining = remaining[1:]
        else:
            question += stand_in
            typed.append(special)
            remaining = remaining[len(special) :]
    text = rendered.text[:start] + question + rendered.text[end:]
    return _Hidden(text, rendered.system, (start, start + len(question)), stand_in, typed)


def _put_back(
    tokenizer: PreTrainedTokenizerBase,
    tokens: _Tokens,
    groups: list[int],
    places: list[int],
    typed: list[str],
) -> tuple[list[int], list[int], dict[str, list[int]]]:
    """(ids, groups, token_inputs) with the tokens at each place (a character of the processor's
    text) replaced by the special string that was typed there, tokenized as text."""
    ids_after: list[int] = []
    groups_after: list[int] = []
    of: list[int] = []  # for each id the token before in whose place it stands
    done = set()
    for index, (id, (start, end)) in enumerate(zip(tokens.ids, tokens.offsets, strict=True)):
        inside = [k for k, place in enumerate(places) if start <= place < end]
        # an unknown token stands for unknown characters beside the special string too
        stays = id == tokenizer.unk_token_id and end - start > len(inside)
        if not inside or stays:
            ids_after.append(id)
            groups_after.append(groups[index])
        for k in inside:
            if k not in done:
                done.add(k)
                as_text = _ids_as_text(tokenizer, typed[k])
                ids_after += as_text
                groups_after += [GROUPS.index("user")] * len(as_text)
        of += [index] * (len(ids_after) - len(of))
    moved = {name: [row[i] for i in of] for name, row in tokens.token_inputs.items()}
    return ids_after, groups_after, moved


def _ids_as_text(tokenizer: PreTrainedTokenizerBase, special: str) -> list[int]:
    """Ids of a special string as ordinary text, as they come behind other text."""
    ids = _behind_text(tokenizer, special, split_special_tokens=True)
    # T5 has its special strings as pieces too, and Kosmos-2's tags are not special: by characters
    if set(ids) & {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}:
        ids = [id for character in special for id in _behind_text(tokenizer, character)]
    return ids


def _behind_text(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    """Ids of a text as they come behind one of a few characters, one with which it makes no common
    token: Tekken has ":[" as one."""
    for lead in ":,;a":
        before = tokenizer(lead, add_special_tokens=False)["input_ids"]
        ids = tokenizer(lead + text, add_special_tokens=False, **options)["input_ids"]
        if ids[: len(before)] == before:
            return list(ids[len(before) :])
    return list(tokenizer(text, add_special_tokens=False, **options)["input_ids"])


# --- tokens and their groups ----------------------------------------------------------------------


@dataclass
class _Tokens:
    """What the processor makes of a prompt and its picture."""

    ids: list[int]
    offsets: list[Span]  # characters of the processor's text
    image_inputs: dict[str, Tensor]
    # what else it says of each token, of which the model's forward takes the token's type and more
    token_inputs: dict[str, list[int]]


def token_types(vlm: VLM) -> dict[str, bool]:
    """What asks a processor for token types where the model's forward takes them: some leave them
    out otherwise."""
    takes = "mm_token_type_ids" in inspect.signature(vlm.model.forward).parameters
    return {"return_mm_token_type_ids": True} if takes else {}


def _tokenize_with_picture(vlm: VLM, image: Image, text: str) -> _Tokens:
    bos = vlm.tokenizer.bos_token
    inputs = vlm.processor(
        images=image,
        text=text,
        return_tensors="pt",
        return_offsets_mapping=True,
        add_special_tokens=not (bos and text.startswith(bos)),
        **token_types(vlm),
    )
    if not {"input_ids", "offset_mapping"} <= set(inputs):
        raise UsageError(
            f"{vlm.path}: it lacks offsets of a prompt's tokens: its processor,"
            f" {type(vlm.processor).__name__}, gives none, so they cannot be put into groups"
        )
    ids = inputs.pop("input_ids")[0].tolist()
    offsets = [(start, end) for start, end in inputs.pop("offset_mapping")[0].tolist()]
    owner = seeing(vlm.model)
    of_pictures = inspect.signature(owner.get_image_features).parameters
    of_tokens = {
        name: value[0].tolist()
        for name, value in inputs.items()
        if torch.is_tensor(value) and value.shape == (1, len(ids)) and name not in of_pictures
    }
    taken = inspect.signature(vlm.model.forward).parameters
    return _Tokens(
        ids,
        offsets,
        {name: value for name, value in inputs.items() if name not in of_tokens},
        {
            name: row
            for name, row in of_tokens.items()
            if name in taken and name != "attention_mask"
        },
    )


@dataclass
class _PictureShift:
    """From characters of the prompt to those of the processor's text, and back.

    The processor writes as many image tokens as the picture has in place of the one placeholder,
    so that what stands behind it moves:

        prompt      USER: <image> What is it?
        processor   USER: <image><image><image><image> What is it?
                          ^ start                      ^ end
                                                       every character from here on moved by `by`
    """

    start: int
    end: int
    by: int

    @classmethod
    def of(cls, vlm: VLM, tokens: _Tokens, text: str) -> _PictureShift:
        """Measured on the offsets of one prompt. ValueError where it has no image token."""
        pictures = [i for i, id in enumerate(tokens.ids) if id == vlm.image_token_id]
        if not pictures:
            raise ValueError(
                f"the processor put no image token (id {vlm.image_token_id}) into the prompt"
            )
        first, last = tokens.offsets[pictures[0]], tokens.offsets[pictures[-1]]
        start = first[0] if first[1] else 0
        placeholder = getattr(vlm.processor, "image_token", None)
        if placeholder:
            # a token that takes the blank before it begins earlier
            end = max(first[1], first[0] + len(placeholder))
            start = max(text.rfind(placeholder, 0, end), 0)
        by = max(end for _, end in tokens.offsets) - len(text)
        # a special token that the processor adds at the end is none of the picture's characters
        begin, end = tokens.offsets[-1]
        if not text.endswith(vlm.tokenizer.convert_ids_to_tokens(tokens.ids[-1])):
            by -= (end - begin) * (tokens.ids[-1] in vlm.tokenizer.all_special_ids)
        return cls(start, last[1], by)

    def in_prompt(self, place: int) -> int:
        """The character of the prompt at a place of the processor's text."""
        return place - self.by if place >= self.end else place

    def moved(self, span: Span) -> Span:
        """Where a span of the prompt is in the processor's text."""
        by = self.by if span[0] >= self.start else 0
        return span[0] + by, span[1] + by


def _groups_of(vlm: VLM, tokens: _Tokens, hidden: _Hidden, shift: _PictureShift) -> list[int]:
    """The group of every token, as an index into GROUPS."""
    tokenizer = vlm.tokenizer
    added = tokenizer.get_added_vocab()
    names = [name for name in vlm.family.markup if name in added]
    markup = {tokenizer.convert_tokens_to_ids(name) for name in names}
    question = shift.moved(hidden.question)
    # BLIP's vision tokens come before the BOS
    of_text = (i for i, id in enumerate(tokens.ids) if id != vlm.image_token_id)
    first = next(of_text, None)

    def group(index: int) -> str:
        id = tokens.ids[index]
        start, end = tokens.offsets[index]
        if id == vlm.image_token_id:
            return "vision"
        if id in markup or (shift.start <= start < end <= shift.end):
            return "image_markup"
        if index == first and id == tokenizer.bos_token_id:
            return "bos"
        in_prompt = shift.in_prompt(start)
        text = hidden.text[in_prompt : in_prompt + end - start]
        # A token belongs to the question by its first character that is no blank; a token of blanks
        # alone, as at the question's end, by its first one.
        word = start + len(text) - len(text.lstrip(" "))
        places = {word, start} if text and not text.strip(" ") else {word}
        if any(question[0] <= place < question[1] for place in places):
            return "user"
        system_place = shift.in_prompt(min(word, end - 1))
        if hidden.system and hidden.system[0] <= system_place < hidden.system[1]:
            return "system"
        return "template"

    return [GROUPS.index(group(index)) for index in range(len(tokens.ids))]


class Encoded(NamedTuple):
    """One sample's tokens, their groups, what the tower gets, and the prompt as text."""

    ids: list[int]
    groups: list[int]
    image_inputs: dict[str, Tensor]
    prompt: str
    token_inputs: dict[str, list[int]]


def encode_sample(vlm: VLM, image: Image, question: str, strip_system: bool = False) -> Encoded:
    """Tokens and groups of a question about a picture. Special strings in the question stay text.
    ValueError where the processor puts no image token into the prompt, or would make the picture
    huge."""
    check_scaled(vlm, image.size)
    rendered = prompt_for(vlm, question, strip_system)
    hidden = _hide_typed_specials(vlm, rendered)
    tokens = _tokenize_with_picture(vlm, image, hidden.text)
    if vlm.family.read_text:
        tokens.image_inputs |= vlm.family.read_text(vlm, rendered.text)
    shift = _PictureShift.of(vlm, tokens, hidden.text)
    groups = _groups_of(vlm, tokens, hidden, shift)
    ids = tokens.ids
    token_inputs = tokens.token_inputs
    if hidden.typed:
        by = shift.moved(hidden.question)[0] - hidden.question[0]
        places = [place + by for place in hidden.places]
        ids, groups, token_inputs = _put_back(vlm.tokenizer, tokens, groups, places, hidden.typed)
    return Encoded(ids, groups, tokens.image_inputs, rendered.text, token_inputs)


def encode(
    vlm: VLM, samples: Sequence[Sample], images: Sequence[Image], strip_system: bool = False
) -> Batch:
    """Samples and their pictures as a batch. The processor sees each sample alone; padding goes to
    the left. ValueError where the prompt and the grid disagree on the number of vision tokens, and
    where a prompt is longer than the model reads."""
    encoded = []
    for asked, image in zip(samples, images, strict=True):
        encoded.append(encode_sample(vlm, image, asked.question, strip_system))
        let_go(image)
    lengths = [len(sample.ids) for sample in encoded]
    check_lengths(vlm, lengths)
    longest = max(lengths)
    pad = vlm.tokenizer.pad_token_id
    rows = vlm.model.get_input_embeddings().num_embeddings
    if pad is None or pad >= rows:  # it is masked, but has to have a row
        pad = 0
    input_ids = torch.full((len(encoded), longest), pad)
    mask = torch.zeros(len(encoded), longest, dtype=torch.long)
    groups = torch.full((len(encoded), longest), PAD)
    token_inputs = {name: torch.zeros_like(mask) for name in encoded[0].token_inputs}
    for row, sample in enumerate(encoded):
        prompt = slice(longest - len(sample.ids), longest)
        input_ids[row, prompt] = torch.tensor(sample.ids)
        mask[row, prompt] = 1
        groups[row, prompt] = torch.tensor(sample.groups)
        for name, value in token_inputs.items():
            value[row, prompt] = torch.tensor(sample.token_inputs[name])
    image_rows = [
        {name: value for name, value in sample.image_inputs.items() if torch.is_tensor(value)}
        for sample in encoded
    ]
    input_ids, mask, groups = (x.to(vlm.device) for x in (input_ids, mask, groups))
    positions, next_position = vlm.family.positions(vlm, input_ids, mask, joined(image_rows))
    grids: list[PatchGrid | None] = [None] * len(encoded)
    if vlm.family.grid:
        for row, (image, sample) in enumerate(zip(images, encoded, strict=True)):
            grid = vlm.family.grid(vlm, image.size, sample.image_inputs)
            tokens = int((groups[row] == VISION).sum())
            if grid is not None and len(grid.boxes) != tokens:
                raise ValueError(
                    f"the prompt has {tokens} vision tokens, the grid of {vlm.family.name}"
                    f" {len(grid.boxes)}"
                )
            grids[row] = grid
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        next_position=next_position,
        groups=groups,
        image_rows=image_rows,
        pictures=[_digest(row) for row in image_rows],
        prompts=[sample.prompt for sample in encoded],
        lengths=lengths,
        grids=grids,
        samples=list(samples),
        token_inputs={name: value.to(vlm.device) for name, value in token_inputs.items()},
    )


def _digest(image_row: dict[str, Tensor]) -> bytes:
    """What tells one picture from another."""
    tensors = [
        value.float() if value.dtype == torch.bfloat16 else value for value in image_row.values()
    ]
    content = b"".join(value.numpy().tobytes() for value in tensors)
    return hashlib.blake2b(content).digest()
