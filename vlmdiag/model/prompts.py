"""The prompt of a question, or of several turns, as text: where it comes from, its system prompt,
where a turn begins and ends."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from vlmdiag.cli import UsageError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from vlmdiag.pictures.samples import Chat, Turn
    from vlmdiag.types import VLM, Record

Span = tuple[int, int]  # characters [start, end)

# Characters of private use that stand for what is filled in after a template is rendered.
_QUESTION = "\ue010\ue011"
_SYSTEM = "\ue012\ue013"
_ANSWER = "\ue014\ue015"

FIELDS = re.compile(r"\{(system|image|question)\}")  # of --prompt_template

# what a chat template raises, by itself or on content that it does not expect
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


class Rendered(NamedTuple):
    """A prompt as text, and where its system prompt (None: it has none) and its question are."""

    text: str
    system: Span | None
    question: Span


class RenderedChat(NamedTuple):
    """A prompt of several turns as text: where its system prompt is (None: it has none), where the
    words of its turns are and whose they are, and the characters at which the turns begin, the last
    of them the answer's."""

    text: str
    system: Span | None
    said: list[tuple[Span, str]]  # role: user, assistant
    starts: list[int]


# --- where a prompt comes from --------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """What makes a model's prompts."""

    name: str  # for people
    is_guess: bool  # not the checkpoint's word for a prompt with a picture
    render: Callable[[str, str | None], str]  # (question, system prompt) -> text
    # (user turns behind the answer) -> a conversation with _ANSWER in it; None: none can be made
    answered: Callable[[int], str] | None = None
    # (turns, system prompt, ends) -> text, see Rendering; None: one question about one picture only
    chat: Callable[[Sequence[Turn], str | None, bool], str] | None = None


def prompt_source(vlm: VLM) -> str:
    """Where a model's prompts come from, in words."""
    return _source(vlm).name


def guessed_prompt(vlm: VLM) -> str | None:
    """A line that says which prompt is used where the checkpoint has none for pictures; None where
    it has one, or --prompt_template gives one."""
    source = _source(vlm)
    if not source.is_guess:
        return None
    text = prompt_for(vlm, "QUESTION").text
    return f"the prompt is {text!r}, by {source.name}; another one: --prompt_template"


def _source(vlm: VLM) -> _Source:
    """--prompt_template, else the model's own."""
    template: str | None = vlm.options.get("prompt_template")
    if template is None:
        return _own_source(vlm)
    image_token = getattr(vlm.processor, "image_token", "<image>")
    return _Source("--prompt_template", False, _template_renderer(template, image_token))


def _own_source(vlm: VLM) -> _Source:
    """The processor's chat template, the family's prompt, or the tokenizer's chat template with the
    picture put in front of the question. A family that only guesses comes last. UsageError where
    there is none."""
    if getattr(vlm.processor, "chat_template", None) is not None:
        return _chat_source(vlm, vlm.processor, "the processor's chat template")
    prompt = vlm.family.prompt
    of_tokenizer = getattr(vlm.tokenizer, "chat_template", None)
    if of_tokenizer is not None and (prompt is None or vlm.family.guesses_prompt):
        return _chat_source(vlm, vlm.tokenizer, "the tokenizer's chat template")
    if prompt is None:
        raise UsageError(
            f"{vlm.path} has no chat template; give the prompt with --prompt_template '..."
            " {image} ... {question} ...'"
        )
    family_prompt = prompt

    def render(question: str, system: str | None) -> str:
        return family_prompt(vlm, question, system)

    if vlm.family.guesses_prompt:
        return _Source("its text model, for it has no chat template", True, render)
    return _Source(f"the prompt of {vlm.family.name} (vlmdiag/families)", False, render)


def _template_renderer(template: str, image_token: str) -> Callable[[str, str | None], str]:
    """--prompt_template, in which \\n stands for a line break."""
    if "{question}" not in template:
        raise UsageError("--prompt_template has no {question}")
    if template.count("{image}") != 1:
        raise UsageError(
            f"--prompt_template has {template.count('{image}')} places for a picture, {{image}} is"
            " wanted once"
        )
    for name in re.findall(r"\{(\w+)\}", template):
        if not FIELDS.fullmatch(f"{{{name}}}"):
            _say_once(f"--prompt_template: {{{name}}} is no field of it, and stays as it is")
    with_breaks = template.replace("\\n", "\n")

    def render(question: str, system: str | None) -> str:
        values = {"system": system or "", "image": image_token, "question": question}
        return FIELDS.sub(lambda field: values[field[1]], with_breaks)

    return render


Rendering = Callable[..., str]  # (messages, ends) -> text; ends: without a generation prompt


def _chat_source(vlm: VLM, owner: ProcessorMixin, name: str) -> _Source:
    """The chat template of a processor or tokenizer."""
    as_text = {"tokenize": False} if owner is vlm.tokenizer else {}

    def rendered(messages: list[Record], ends: bool = False) -> str:
        return owner.apply_chat_template(messages, add_generation_prompt=not ends, **as_text)

    placeholder = _placeholder(vlm, rendered, name)
    if placeholder:
        name += f" for text, with {placeholder} in front of the question"

    def takes_parts(role: str, text: str) -> bool:
        """Whether messages of a role are parts too: some templates take parts in the user's turn
        only, and write others as Python writes a list."""
        if placeholder is not None:
            return False
        user, message = _user(_QUESTION, None), _message(role, text, True)
        messages = [message, user] if role == "system" else [user, message]
        try:
            return text in rendered(messages, ends=role == "assistant")
        except _REFUSALS:
            return False

    def render(question: str, system: str | None) -> str:
        user = _user(question, placeholder)
        if system is None:
            return rendered([user])
        return rendered([_message("system", system, takes_parts("system", _SYSTEM)), user])

    def answered(turns: int) -> str:
        user = _user(_QUESTION, placeholder)
        answer = _message("assistant", _ANSWER, takes_parts("assistant", _ANSWER))
        return rendered([user, answer, *[user] * turns], ends=True)

    def chat(turns: Sequence[Turn], system: str | None, ends: bool) -> str:
        messages = []
        if system is not None:
            messages.append(_message("system", system, takes_parts("system", _SYSTEM)))
        for turn in turns:
            as_text = turn.role == "assistant" and not takes_parts("assistant", _ANSWER)
            messages.append(_turn(turn, (placeholder or "") if as_text else placeholder))
        return rendered(messages, ends)

    writes_one = placeholder == ""  # picture, by itself
    return _Source(name, bool(placeholder), render, answered, None if writes_one else chat)


def _placeholder(vlm: VLM, rendered: Rendering, name: str) -> str | None:
    """What stands for the picture in front of a question: None where the template reads messages of
    parts, of which one is the picture; "" where it writes the picture by itself; the image token
    where it is made for text. UsageError where it cannot be rendered, or makes no room for a
    picture."""
    image_token = getattr(vlm.processor, "image_token", None) or "<image>"
    parts = _user(_QUESTION, None)
    without_picture = _message("user", _QUESTION, True)
    try:
        text = rendered([parts])
        reads_parts = _QUESTION in text and text != rendered([without_picture])
        pictures = text.count(image_token)
        reason = "it writes no picture"
    except _REFUSALS as error:
        reads_parts, pictures = False, 0
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if reads_parts and pictures <= 1:
        return None
    try:
        by_itself = rendered([_user(_QUESTION, "")])
    except _REFUSALS as error:
        if reads_parts:
            return None
        raise UsageError(
            f"{vlm.path}: {name} cannot be rendered ({reason}); give --prompt_template"
        ) from error
    if pictures > 1 and by_itself.count(image_token) == 1:
        return ""
    if reads_parts:
        return None
    added = vlm.tokenizer.get_added_vocab()
    if any(mark in added for mark in vlm.family.markup):
        raise UsageError(
            f"{vlm.path}: {name} cannot be used for a picture ({reason}); give --prompt_template,"
            " or put the chat_template.json of the published model beside it"
        )
    return image_token


def _message(role: str, text: str, as_parts: bool) -> Record:
    return {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}


def _turn(turn: Turn, placeholder: str | None) -> Record:
    """A turn as parts, or as text with a placeholder for each picture."""
    if placeholder is not None:
        parts = [f"{placeholder}\n" if part is None else part for part in turn.parts]
        return _message(turn.role, "".join(parts), False)
    content = [
        {"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


def _user(question: str, placeholder: str | None) -> Record:
    """The user's turn as parts, or as text with a placeholder in front."""
    if placeholder is not None:
        text = f"{placeholder}\n{question}" if placeholder else question
        return _message("user", text, False)
    message = _message("user", question, True)
    return {"role": "user", "content": [{"type": "image"}, *message["content"]]}


# --- a question's prompt --------------------------------------------------------------------------


def prompt_for(vlm: VLM, question: str, strip_system: bool = False) -> Rendered:
    """The prompt of a question. strip_system, or --system_prompt '': without a system prompt. A
    placeholder of the picture at the question's edge, as training data have it, is removed.
    UsageError where there is no template, or it refuses the given system prompt; ValueError where
    it changes the question."""
    source = _source(vlm)
    question = _without_placeholder(vlm, question)
    text, system, message = _with_system(vlm, source, strip_system)
    # Templates may write both without blanks at an end.
    whole = source.render(question, message)
    for asked, said in itertools.product(_trimmed(question), _trimmed(system)):
        filled = _filled(text, said, asked)
        if filled.text == whole:
            return filled
    raise ValueError(
        f"the chat template changes the question {question!r} or the system prompt; give"
        " --prompt_template"
    )


def _with_system(vlm: VLM, source: _Source, strip_system: bool) -> tuple[str, str, str | None]:
    """(prompt of _QUESTION, in which _SYSTEM stands for the system prompt, the system prompt, what
    the system message says, None where there is none). UsageError: see prompt_for()."""

    def render(system: str | None) -> str:
        return source.render(_QUESTION, system)

    given: str | None = vlm.options.get("system_prompt")
    if strip_system or given == "":
        text, system, message = _with_own_system(render, strip=True)
    elif given is not None:
        text, system, message = _with_given_system(vlm, render), given, given
    else:
        text, system, message = _with_own_system(render, strip=False)
        default = vlm.family.default_system
        if not system and default is not None:
            message = default(vlm, text)
            marked = _rendered_or_none(render, _SYSTEM) if message else None
            # a template that names the role in front of it makes another prompt of it
            before = marked.partition(_SYSTEM)[0] if marked and _SYSTEM in marked else "none"
            if marked and before in ("", vlm.tokenizer.bos_token):
                text, system = marked, message or ""
            else:
                message = None
    if _QUESTION not in text:
        raise UsageError(
            f"{vlm.path}: the chat template does not keep the question as it is; give"
            " --prompt_template"
        )
    return text, system, message


def _trimmed(text: str) -> tuple[str, ...]:
    return text, text.rstrip(), text.lstrip(), text.strip()


def _with_given_system(vlm: VLM, render: Callable[[str | None], str]) -> str:
    """The prompt with _SYSTEM for --system_prompt; UsageError where the template has no room."""
    try:
        text = render(_SYSTEM)
    except _REFUSALS as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"{vlm.path}: the chat template refuses a system prompt ({reason}); leave out"
            " --system_prompt, or give the whole prompt with --prompt_template"
        ) from error
    if _SYSTEM not in text:
        raise UsageError(
            f"{vlm.path}: its prompt has no room for --system_prompt; give the whole prompt with"
            " --prompt_template, in which {system} stands for it"
        )
    return text


def _rendered_or_none(render: Callable[[str | None], str], system: str | None) -> str | None:
    """The prompt, None where the template refuses the system message."""
    try:
        return render(system)
    except _REFUSALS:
        return None


def _with_own_system(
    render: Callable[[str | None], str], strip: bool
) -> tuple[str, str, str | None]:
    """(prompt, system prompt, system message) where the user gives none or strips it. A template
    may write a system prompt of its own: it is what a prompt without a system message has in the
    place where one with a system message has that message."""
    text = render(None)
    marked = _rendered_or_none(render, _SYSTEM)
    if marked is None:
        return text, "", None
    before, _, after = marked.partition(_SYSTEM)
    own = ""
    if marked != before and text.startswith(before) and text.endswith(after):
        own = text[len(before) : len(text) - len(after)]
    if not own:
        return text, "", None
    if strip:
        bare = render("")
        if own in bare:
            raise UsageError(
                "the chat template writes its system prompt in any case; give the whole prompt with"
                " --prompt_template"
            )
        return bare, "", ""
    return before + _SYSTEM + after, own, None


def _filled(text: str, system: str, question: str) -> Rendered:
    """The prompt with question and system prompt in place of what stands for them."""
    filled, spans = _replaced(text, {_SYSTEM: system, _QUESTION: question})
    return Rendered(filled, spans.get(_SYSTEM) if system else None, spans[_QUESTION])


def _replaced(text: str, values: Mapping[str, str]) -> tuple[str, dict[str, Span]]:
    """The text with values in place of what stands for them, and where they are."""
    spans: dict[str, Span] = {}
    for stand_in in sorted(values, key=text.find):  # from left to right, so that spans stay
        start = text.find(stand_in)
        if start >= 0:
            value = values[stand_in]
            text = text[:start] + value + text[start + len(stand_in) :]
            spans[stand_in] = (start, start + len(value))
    return text, spans


def _without_placeholder(vlm: VLM, question: str) -> str:
    """A question without the placeholders of the picture at its edges: the prompt has its own."""
    placeholders = {"<image>", getattr(vlm.processor, "image_token", None) or "<image>"}
    bare = question.strip()
    while True:
        found = [mark for mark in placeholders if bare.startswith(mark) or bare.endswith(mark)]
        if not found:
            break
        bare = bare.removeprefix(found[0]).removesuffix(found[0]).strip()
    if bare == question.strip() or not bare:
        return question
    _say_once(
        f"{', '.join(sorted(placeholders))} at the edge of a question is removed: the prompt"
        " has the picture in its own place"
    )
    return bare


@functools.cache
def _say_once(line: str) -> None:
    print(line)


# --- a conversation's prompt ----------------------------------------------------------------------


def chat_for(vlm: VLM, chat: Chat, strip_system: bool = False) -> RenderedChat:
    """The prompt of several turns, about several pictures. A system message of the chat's own takes
    the place of every other one; strip_system leaves it out too. UsageError where the model is
    asked by no chat template of pictures, or it changes what is said."""
    source = _source(vlm)
    if source.chat is None:
        raise UsageError(
            f"{vlm.path}: {vlm.family.name} takes one question about one picture here: several"
            f" pictures or turns need a chat template, and its prompt is from {source.name}"
        )
    write = source.chat
    system, message = chat.system or "", chat.system
    if message is None or strip_system:
        _, system, message = _with_system(vlm, source, strip_system)
    words: dict[str, str] = {}  # what stands for a part -> the part
    of_turns: list[list[str]] = []  # what stands for the parts of each turn
    marked: list[Turn] = []
    turns = [
        replace(turn, parts=tuple(part and _without_placeholder(vlm, part) for part in turn.parts))
        for turn in chat.turns
    ]
    for turn in turns:
        parts: list[str | None] = []
        for part in turn.parts:
            parts.append(part if part is None else f"\ue016{chr(0xE100 + len(words))}")
            if part is not None:
                words[parts[-1] or ""] = part
        of_turns.append([part for part in parts if part is not None])
        marked.append(replace(turn, parts=tuple(parts)))
    asked = _SYSTEM if message else message
    try:
        text = write(marked, asked, False)
        whole = write(turns, message, False)
    except _REFUSALS as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"{vlm.path}: {source.name} refuses the turns of this prompt ({reason})"
        ) from error
    places = [text.find(stand_in) for stand_in in words]
    if -1 in places or places != sorted(places):
        raise UsageError(f"{vlm.path}: {source.name} does not keep what the turns say")
    starts = _turn_starts(write, text, marked, of_turns, asked if message else system or None)
    for trim in (str, str.rstrip, str.lstrip, str.strip):
        values = {stand_in: trim(part) for stand_in, part in words.items()}
        for said in _trimmed(system):
            filled, spans = _replaced(text, values | ({_SYSTEM: said} if message else {}))
            if filled == whole:
                own = filled.find(said) if said and not message else -1
                return RenderedChat(
                    filled,
                    spans.get(_SYSTEM) or ((own, own + len(said)) if own >= 0 else None),
                    [
                        (spans[stand_in], turn.role)
                        for turn, of_turn in zip(turns, of_turns, strict=True)
                        for stand_in in of_turn
                    ],
                    [_moved(start, text, spans) for start in starts],
                )
    raise UsageError(f"{vlm.path}: {source.name} changes what the turns or the system prompt say")


def _turn_starts(
    write: Callable[[Sequence[Turn], str | None, bool], str],
    text: str,
    turns: Sequence[Turn],
    of_turns: Sequence[Sequence[str]],
    system: str | None,
) -> list[int]:
    """The characters at which the turns of a prompt begin, and that at which the answer's does: as
    far as the prompt of the turns before is the same, which holds their marks of roles and ends,
    but never within what a turn says."""
    starts = []
    for count in range(len(turns) + 1):
        before = [stand_in for of_turn in of_turns[:count] for stand_in in of_turn]
        behind = [stand_in for of_turn in of_turns[count:] for stand_in in of_turn]
        low = max((text.find(stand_in) + len(stand_in) for stand_in in before), default=0)
        high = min((text.find(stand_in) for stand_in in behind), default=len(text))
        common = 0
        if count or system:
            try:
                common = len(os.path.commonprefix([write(turns[:count], system, True), text]))
            except _REFUSALS:
                common = 0
        if count == 0 and system and system in text[:high]:
            low = text.find(system) + len(system)
        starts.append(min(max(common, low), high))
    return starts


def _moved(place: int, text: str, spans: Mapping[str, Span]) -> int:
    """A place of a text that has stand-ins in the text that has what they stand for."""
    before = [name for name in spans if 0 <= text.find(name) < place]
    return place + sum(spans[name][1] - spans[name][0] - len(name) for name in before)


# --- where a turn ends ----------------------------------------------------------------------------


def turn_end(vlm: VLM) -> str | None:
    """The token with which the model's own chat template ends an answer; None where it writes none
    or there is no template."""
    if vlm.family.turn_end is not None:
        token = vlm.family.turn_end(vlm)
        if token is not None:
            return token
    try:
        source = _own_source(vlm)
    except UsageError:
        return None
    if source.answered is None:
        return None
    added = sorted(vlm.tokenizer.get_added_vocab(), key=len, reverse=True)
    start_of_turn, _, start_of_answer = source.render(_QUESTION, None).partition(_QUESTION)
    start_of_answer = start_of_answer.rstrip()
    for turns in (0, 1):  # some templates end a turn only where another one follows
        try:
            _, answer, after = source.answered(turns).partition(_ANSWER)
        except _REFUSALS:
            continue
        if not answer:
            return None
        if turns == 0 and after.strip() and start_of_answer.endswith(after.rstrip()):
            return None  # the template writes the beginning of the next answer in any case
        after = after.lstrip()
        token = next((name for name in added if name.strip() and after.startswith(name)), None)
        if token is not None and (turns == 0 or token not in start_of_turn):
            return token
    return None
