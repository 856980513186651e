"""From a sample to a batch: the tokens of its prompt and their groups, padded on the left.

Groups come from token ids and from tokenizer offsets in the rendered prompt, never from counting:
each token is asked which characters of the prompt it stands for, and the prompt knows where its
system prompt and its question are.
"""

from __future__ import annotations

import hashlib
import inspect
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from transformers import ProcessorMixin

from vlmdiag.batch import Batch, joined
from vlmdiag.cli import UsageError
from vlmdiag.families.generic import seeing
from vlmdiag.groups import GROUPS, PAD
from vlmdiag.model.limits import check_lengths, check_scaled
from vlmdiag.model.processed import once
from vlmdiag.model.prompts import Span, chat_for, prompt_for
from vlmdiag.pictures.deferred import let_go
from vlmdiag.pictures.samples import Chat, Turn

if TYPE_CHECKING:
    from jaxtyping import Int
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from vlmdiag.pictures.samples import Pictures, Sample
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
    """A prompt in whose words every special string is one character that stands for it."""

    text: str
    system: Span | None
    said: list[tuple[Span, str]]  # what people and the model said, and its group
    stand_in: str
    typed: list[tuple[str, str]]  # the special strings, in order, each with its group
    starts: list[int]  # of turns

    @property
    def places(self) -> list[int]:
        """Characters of the text that stand for special strings."""
        inside = [i for (start, end), _ in self.said for i in range(start, end)]
        return [i for i in inside if self.text[i] == self.stand_in]


def _specials(vlm: VLM, around: str) -> list[str]:
    """Strings that mean something besides their letters, longest first: the tokenizer's special
    tokens, what stands for the picture, and the marks with which the prompt itself is built, by
    what is around its words. Other added tokens, a fine-tune's own words or runs of blanks, are
    ordinary vocabulary."""
    names = {str(token) for token in vlm.tokenizer.all_special_tokens} | set(vlm.family.markup)
    names.add(getattr(vlm.processor, "image_token", None) or "")
    for token in vlm.tokenizer.added_tokens_decoder.values():
        name = token.content.strip()
        is_mark = not name.isalnum() and name in around
        if token.special or (name and is_mark):
            names.add(token.content)
    return sorted(filter(None, names), key=len, reverse=True)


def _hide_typed_specials(
    vlm: VLM,
    text: str,
    system: Span | None,
    said: Sequence[tuple[Span, str]],
    starts: Sequence[int] = (),
) -> _Hidden:
    """Special strings that a person typed, such as </s>, must stay text: hide them from the
    tokenizer; _put_back() tokenizes them as text. said: from left to right."""
    stand_in = next(chr(code) for code in range(0xE020, 0xF8FF) if chr(code) not in text)
    pieces = [text[start:end] for (start, end), _ in said]
    ends = [0, *(end for (_, end), _ in said)]
    begins = [*(start for (start, _), _ in said), len(text)]
    around = [text[end:start] for end, start in zip(ends, begins, strict=True)]
    specials = _specials(vlm, "".join(around))
    hidden = around[0]
    said_after: list[tuple[Span, str]] = []
    typed: list[tuple[str, str]] = []
    for piece, behind, (_, group) in zip(pieces, around[1:], said, strict=True):
        words, found = _hidden(piece, specials, stand_in)
        said_after.append(((len(hidden), len(hidden) + len(words)), group))
        typed += [(special, group) for special in found]
        hidden += words + behind

    def moved(place: int) -> int:
        """A place outside of what is said."""
        count = sum(end <= place for (_, end), _ in said)
        return place + (said_after[count - 1][0][1] - said[count - 1][0][1] if count else 0)

    return _Hidden(
        hidden,
        system and (moved(system[0]), moved(system[1])),
        said_after,
        stand_in,
        typed,
        [moved(start) for start in starts],
    )


def ids_of_words(vlm: VLM, lead: str, words: str, around: str) -> list[int]:
    """Ids of words behind a few characters, without what a tokenizer adds; special strings that
    stand in the words stay text. around: a prompt that has the marks of the model's prompts."""
    stand_in = next(chr(code) for code in range(0xE020, 0xF8FF) if chr(code) not in lead + words)
    shown, typed = _hidden(words, _specials(vlm, around), stand_in)
    if not typed:
        return list(vlm.tokenizer(lead + words, add_special_tokens=False)["input_ids"])
    text = lead + shown
    read = vlm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = _Tokens(read["input_ids"], read["offset_mapping"], {}, {})
    places = [place for place, letter in enumerate(text) if letter == stand_in]
    of_answer = [(special, "generated") for special in typed]
    groups = [GROUPS.index("generated")] * len(tokens.ids)
    return _put_back(vlm.tokenizer, tokens, groups, places, of_answer)[0]


def _hidden(words: str, specials: Sequence[str], stand_in: str) -> tuple[str, list[str]]:
    """(words with one character for each special string, these strings)."""
    shown = ""
    typed = []
    while words:
        special = next((name for name in specials if words.startswith(name)), None)
        if special is None:
            shown += words[0]
            words = words[1:]
        else:
            shown += stand_in
            typed.append(special)
            words = words[len(special) :]
    return shown, typed


def _put_back(
    tokenizer: PreTrainedTokenizerBase,
    tokens: _Tokens,
    groups: list[int],
    places: list[int],
    typed: list[tuple[str, str]],
) -> tuple[list[int], list[int], dict[str, list[int]]]:
    """(ids, groups, token_inputs) with the tokens at each place (a character of the processor's
    text) replaced by the special string that was typed there, tokenized as text. typed: these
    strings, each with its group."""
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
                as_text = _ids_as_text(tokenizer, typed[k][0])
                ids_after += as_text
                groups_after += [GROUPS.index(typed[k][1])] * len(as_text)
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
    # of each picture: characters of its placeholder in the prompt, and of what stands for it in the
    # processor's text; for prompts of several pictures or turns
    replaced: list[tuple[Span, Span]] = field(default_factory=list)


def token_types(vlm: VLM) -> dict[str, bool]:
    """What asks a processor for token types where the model's forward takes them: some leave them
    out otherwise."""
    takes = "mm_token_type_ids" in inspect.signature(vlm.model.forward).parameters
    return {"return_mm_token_type_ids": True} if takes else {}


def _tokenize_with_pictures(
    vlm: VLM, images: Image | Sequence[Image], text: str, **options: bool
) -> _Tokens:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(
            "the prompt has half of a surrogate pair, which no tokenizer takes as text"
        )
    bos = vlm.tokenizer.bos_token
    inputs = once(vlm.processor)(
        images=images,
        text=text,
        return_tensors="pt",
        return_offsets_mapping=True,
        add_special_tokens=not (bos and text.startswith(bos)),
        **token_types(vlm),
        **options,
    )
    if not {"input_ids", "offset_mapping"} <= set(inputs):
        raise UsageError(
            f"{vlm.path}: it lacks offsets of a prompt's tokens: its processor,"
            f" {type(vlm.processor).__name__}, gives none, so they cannot be put into groups"
        )
    ids = inputs.pop("input_ids")[0].tolist()
    offsets = [(start, end) for start, end in inputs.pop("offset_mapping")[0].tolist()]
    replaced = inputs.pop("text_replacement_offsets", None) or [[]]
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
        [(one["span"], one["new_span"]) for one in replaced[0]],
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

    def in_picture(self, start: int, end: int) -> bool:
        """Whether characters of the processor's text stand for a picture."""
        return self.start <= start < end <= self.end


@dataclass
class _PictureShifts:
    """The same for a prompt of several pictures, by what the processor says of its placeholders:
    (characters in the prompt, in its text) of each."""

    replaced: list[tuple[Span, Span]]

    def in_prompt(self, place: int) -> int:
        """The character of the prompt at a place of the processor's text."""
        by = 0
        for old, new in self.replaced:
            if new[0] <= place < new[1]:
                return old[0]
            if place >= new[1]:
                by = new[1] - old[1]
        return place - by

    def moved(self, span: Span) -> Span:
        """Where a span of the prompt is in the processor's text."""
        by = max((new[1] - old[1] for old, new in self.replaced if old[1] <= span[0]), default=0)
        return span[0] + by, span[1] + by

    def number(self, start: int, end: int) -> int:
        """The picture that characters of the processor's text stand for, -1: none."""
        inside = [start < new[1] and new[0] < end for _, new in self.replaced]
        return inside.index(True) if True in inside else -1

    def in_picture(self, start: int, end: int) -> bool:
        """Whether characters of the processor's text stand for a picture."""
        return self.number(start, end) >= 0


def _groups_of(
    vlm: VLM, tokens: _Tokens, hidden: _Hidden, shift: _PictureShift | _PictureShifts
) -> list[int]:
    """The group of every token, as an index into GROUPS."""
    tokenizer = vlm.tokenizer
    added = tokenizer.get_added_vocab()
    names = [name for name in vlm.family.markup if name in added]
    markup = {tokenizer.convert_tokens_to_ids(name) for name in names}
    said = [(shift.moved(span), group) for span, group in hidden.said]
    # BLIP's vision tokens come before the BOS
    of_text = (i for i, id in enumerate(tokens.ids) if id != vlm.image_token_id)
    first = next(of_text, None)

    def group(index: int) -> str:
        id = tokens.ids[index]
        start, end = tokens.offsets[index]
        if id == vlm.image_token_id:
            return "vision"
        if id in markup or shift.in_picture(start, end):
            return "image_markup"
        if index == first and id == tokenizer.bos_token_id:
            return "bos"
        in_prompt = shift.in_prompt(start)
        text = hidden.text[in_prompt : in_prompt + end - start]
        # A token belongs to what is said by its first character that is no blank; a token of blanks
        # alone, as at the question's end, by its first one.
        word = start + len(text) - len(text.lstrip(" "))
        places = {word, start} if text and not text.strip(" ") else {word}
        for (first_said, end_said), group in said:
            if any(first_said <= place < end_said for place in places):
                return group
        system_place = shift.in_prompt(min(word, end - 1))
        if hidden.system and hidden.system[0] <= system_place < hidden.system[1]:
            return "system"
        return "template"

    return [GROUPS.index(group(index)) for index in range(len(tokens.ids))]


class Encoded(NamedTuple):
    """One sample's tokens, their groups, what the tower gets of each picture, and the prompt as
    text. numbers, turns: as in Batch, [] where the sample has no chat."""

    ids: list[int]
    groups: list[int]
    pictures: list[dict[str, Tensor]]
    prompt: str
    token_inputs: dict[str, list[int]]
    numbers: list[int]
    turns: list[int]


def encode_sample(vlm: VLM, image: Image, question: str, strip_system: bool = False) -> Encoded:
    """Tokens and groups of a question about a picture. Special strings in the question stay text.
    ValueError where the processor puts no image token into the prompt, or would make the picture
    huge."""
    check_scaled(vlm, image.size)
    rendered = prompt_for(vlm, question, strip_system)
    said = [(rendered.question, "user")]
    hidden = _hide_typed_specials(vlm, rendered.text, rendered.system, said)
    tokens = _tokenize_with_pictures(vlm, image, hidden.text)
    if vlm.family.read_text:
        tokens.image_inputs |= vlm.family.read_text(vlm, rendered.text)
    shift = _PictureShift.of(vlm, tokens, hidden.text)
    ids, groups, token_inputs = _placed(vlm, tokens, hidden, shift)
    return Encoded(ids, groups, [tokens.image_inputs], rendered.text, token_inputs, [], [])


def _placed(
    vlm: VLM, tokens: _Tokens, hidden: _Hidden, shift: _PictureShift | _PictureShifts
) -> tuple[list[int], list[int], dict[str, list[int]]]:
    """(ids, groups, token_inputs) of a prompt, typed special strings as text again."""
    groups = _groups_of(vlm, tokens, hidden, shift)
    if not hidden.typed:
        return tokens.ids, groups, tokens.token_inputs
    places = [shift.moved((place, place + 1))[0] for place in hidden.places]
    return _put_back(vlm.tokenizer, tokens, groups, places, hidden.typed)


def encode_chat(
    vlm: VLM, images: Sequence[Image], chat: Chat, strip_system: bool = False
) -> Encoded:
    """Tokens and groups of a prompt of several pictures or turns; earlier answers are in the group
    `generated`. UsageError where the model or its processor takes one picture only, or sees a
    picture otherwise among others than alone."""
    for image in images:
        check_scaled(vlm, image.size)
    rendered = chat_for(vlm, chat, strip_system)
    if vlm.parts.qformer is not None or not isinstance(vlm.processor, ProcessorMixin):
        _refuse_several(vlm, f"{type(vlm.processor).__name__} prepares one picture")
    group_of = {"user": "user", "assistant": "generated"}
    said = [(span, group_of[role]) for span, role in rendered.said]
    hidden = _hide_typed_specials(vlm, rendered.text, rendered.system, said, rendered.starts)
    placeholder = getattr(vlm.processor, "image_token", None) or ""
    places = hidden.text.count(placeholder) if placeholder else 0
    if places != len(images):
        _refuse_several(vlm, f"its prompt has {places} places for {len(images)} pictures")
    one = prompt_for(vlm, "?").text
    try:
        tokens = _tokenize_with_pictures(
            vlm, list(images), hidden.text, return_text_replacement_offsets=True
        )
        alone = [_tokenize_with_pictures(vlm, image, one).image_inputs for image in images]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        _refuse_several(vlm, f"{type(vlm.processor).__name__} does not take them ({reason})")
    if len(tokens.replaced) != len(images):
        _refuse_several(vlm, f"{type(vlm.processor).__name__} does not say where its pictures are")
    pictures = [_tensors(inputs) for inputs in alone]
    if not _same_pictures(_tensors(tokens.image_inputs), pictures):
        _refuse_several(vlm, "its processor prepares a picture otherwise among several than alone")
    shifts = _PictureShifts(tokens.replaced)
    turns = [_turn_of(hidden, shifts, offsets) for offsets in tokens.offsets]
    of_tokens = replace(tokens, token_inputs=tokens.token_inputs | {TURNS: turns})
    numbers = [shifts.number(start, end) for start, end in tokens.offsets]
    of_tokens.token_inputs[NUMBERS] = numbers
    ids, groups, token_inputs = _placed(vlm, of_tokens, hidden, shifts)
    turns = token_inputs.pop(TURNS)
    numbers = token_inputs.pop(NUMBERS)
    for index, group in enumerate(groups):
        if GROUPS[group] in ("bos", "system"):
            turns[index] = -1
    numbers = _with_marks(numbers, groups)
    return Encoded(ids, groups, pictures, rendered.text, token_inputs, numbers, turns)


def _turn_of(hidden: _Hidden, shifts: _PictureShifts, offsets: Span) -> int:
    """The turn of a token, by its first character that is no blank."""
    start, end = offsets
    place = shifts.in_prompt(start)
    if not shifts.in_picture(start, end):
        text = hidden.text[place : place + end - start]
        if text.strip(" "):
            place += len(text) - len(text.lstrip(" "))
    return bisect_right(hidden.starts, place) - 1


# of token_inputs, while typed strings are put back
NUMBERS, TURNS = "picture numbers", "turns"


def _refuse_several(vlm: VLM, reason: str) -> NoReturn:
    raise UsageError(
        f"{vlm.path}: {vlm.family.name} takes one question about one picture here, and no several"
        f" pictures or turns: {reason}"
    )


def _same_pictures(whole: dict[str, Tensor], alone: Sequence[dict[str, Tensor]]) -> bool:
    """Whether image inputs of several pictures are those of each alone, joined along the first
    dimension or, where that is of samples, along the second one."""
    along_first = joined(list(alone))
    if whole.keys() != along_first.keys():
        return False
    for name, tensor in whole.items():
        of_each = [inputs[name] for inputs in alone]
        alike = [along_first[name]]
        if all(len(one) == 1 and one.ndim > 1 for one in of_each):
            alike.append(joined([{name: one[0]} for one in of_each])[name][None])
        if not any(torch.equal(tensor, one) for one in alike):
            return False
    return True


def _with_marks(numbers: Sequence[int], groups: Sequence[int]) -> list[int]:
    """Numbers of pictures with those of the marks that the template writes around pictures: of the
    marks between two pictures the first half is the earlier one's."""
    found = list(numbers)
    mark = GROUPS.index("image_markup")
    for index, group in enumerate(groups):
        if group == mark and numbers[index] < 0:
            first = last = index
            while first > 0 and groups[first - 1] == mark and numbers[first - 1] < 0:
                first -= 1
            while last + 1 < len(groups) and groups[last + 1] == mark and numbers[last + 1] < 0:
                last += 1
            before = numbers[first - 1] if first else -1
            behind = numbers[last + 1] if last + 1 < len(groups) else -1
            is_before = before >= 0 and (behind < 0 or 2 * (index - first) < last + 1 - first)
            found[index] = before if is_before else behind
    return found


def _tensors(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if torch.is_tensor(value)}


def _encoded(
    vlm: VLM, sample: Sample, images: Pictures, strip_system: bool, as_chat: bool
) -> Encoded:
    """One sample; as_chat: a question about one picture as a chat too."""
    if not as_chat:
        assert not isinstance(images, tuple)
        return encode_sample(vlm, images, sample.question, strip_system)
    several = images if isinstance(images, tuple) else (images,)
    chat = sample.chat or Chat((sample.image,), (Turn("user", (None, sample.question)),))
    return encode_chat(vlm, several, chat, strip_system)


def encode(
    vlm: VLM, samples: Sequence[Sample], images: Sequence[Pictures], strip_system: bool = False
) -> Batch:
    """Samples and their pictures as a batch. The processor sees each sample alone; padding goes to
    the left. images: of a sample with a chat the tuple of its pictures. ValueError where the prompt
    and the grid disagree on the number of vision tokens, and where a prompt is longer than the
    model reads; UsageError for a chat that the model does not take, see encode_chat()."""
    as_chats = any(sample.chat is not None for sample in samples)
    encoded = []
    for asked, of_sample in zip(samples, images, strict=True):
        encoded.append(_encoded(vlm, asked, of_sample, strip_system, as_chats))
        for image in of_sample if isinstance(of_sample, tuple) else (of_sample,):
            let_go(image)
    lengths = [len(sample.ids) for sample in encoded]
    check_lengths(vlm, lengths)
    longest = max(lengths)
    pad = vlm.tokenizer.pad_token_id
    largest = max(max(sample.ids) for sample in encoded)
    if largest >= vlm.vocabulary:
        raise ValueError(
            f"the prompt has {vlm.tokenizer.convert_ids_to_tokens(largest)!r}, id {largest}, where"
            f" the model's embeddings have {vlm.vocabulary} rows: were they resized with the"
            " tokenizer?"
        )
    if pad is None or pad >= vlm.vocabulary:  # it is masked, but has to have a row
        pad = 0
    input_ids = torch.full((len(encoded), longest), pad)
    mask = torch.zeros(len(encoded), longest, dtype=torch.long)
    groups = torch.full((len(encoded), longest), PAD)
    of_chats = {NUMBERS: torch.full_like(groups, -1), TURNS: torch.full_like(groups, -1)}
    token_inputs = {name: torch.zeros_like(mask) for name in encoded[0].token_inputs}
    for row, sample in enumerate(encoded):
        prompt = slice(longest - len(sample.ids), longest)
        input_ids[row, prompt] = torch.tensor(sample.ids)
        mask[row, prompt] = 1
        groups[row, prompt] = torch.tensor(sample.groups)
        for name, value in token_inputs.items():
            value[row, prompt] = torch.tensor(sample.token_inputs[name])
        if as_chats:
            of_chats[NUMBERS][row, prompt] = torch.tensor(sample.numbers)
            of_chats[TURNS][row, prompt] = torch.tensor(sample.turns)
    image_rows = [_tensors(inputs) for sample in encoded for inputs in sample.pictures]
    input_ids, mask, groups = (x.to(vlm.device) for x in (input_ids, mask, groups))
    batch = Batch(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=mask,
        next_position=mask[:, -1],
        groups=groups,
        image_rows=image_rows,
        pictures=[_digest(row) for row in image_rows],
        prompts=[sample.prompt for sample in encoded],
        lengths=lengths,
        grids=[None] * len(image_rows),
        samples=list(samples),
        token_inputs={name: value.to(vlm.device) for name, value in token_inputs.items()},
        numbers=of_chats[NUMBERS].to(vlm.device) if as_chats else None,
        turns=of_chats[TURNS].to(vlm.device) if as_chats else None,
    )
    batch.position_ids, batch.next_position = _positions(vlm, batch)
    sizes = [
        image.size
        for of_sample in images
        for image in (of_sample if isinstance(of_sample, tuple) else (of_sample,))
    ]
    if vlm.family.grid:
        inputs_of = [inputs for sample in encoded for inputs in sample.pictures]
        for picture, in_picture in enumerate(batch.in_pictures()):
            grid = vlm.family.grid(vlm, sizes[picture], inputs_of[picture])
            tokens = int(in_picture.sum())
            if grid is not None and len(grid.boxes) != tokens:
                raise ValueError(
                    f"the prompt has {tokens} vision tokens, the grid of {vlm.family.name}"
                    f" {len(grid.boxes)}"
                )
            batch.grids[picture] = grid
    return batch


def _positions(vlm: VLM, batch: Batch) -> tuple[Int[Tensor, "... B T"], Int[Tensor, " B"]]:
    """Positions of a batch's tokens; where samples have chats of one sample alone after the other,
    for families count on one picture each."""
    ids, mask = batch.input_ids, batch.attention_mask
    if batch.numbers is None:
        return vlm.family.positions(vlm, ids, mask, batch.image_inputs)
    of_rows = []
    for row in range(len(ids)):
        inputs = joined(batch.image_rows[batch.of_sample(row)])
        one = slice(row, row + 1)
        of_rows.append(vlm.family.positions(vlm, ids[one], mask[one], inputs))
    # (B, T) or (axes, B, T)
    return (
        torch.cat([positions for positions, _ in of_rows], -2),
        torch.cat([after for _, after in of_rows]),
    )


def _digest(image_row: dict[str, Tensor]) -> bytes:
    """What tells one picture from another."""
    tensors = [
        value.float() if value.dtype == torch.bfloat16 else value for value in image_row.values()
    ]
    content = b"".join(value.numpy().tobytes() for value in tensors)
    return hashlib.blake2b(content).digest()
