"""Conversation templates of LLaVA's authors, as a processor's chat template for one user turn."""

from __future__ import annotations

import json
from string import Template
from typing import TYPE_CHECKING, NamedTuple

from vlmdiag.cli import UsageError
from vlmdiag.families.llava import SYSTEM

if TYPE_CHECKING:
    from vlmdiag.families.contract import Config

IMAGE = "<image>"
MARKUP = ("<im_start>", "<im_end>")
USER = SYSTEM.replace("human", "user")
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
)


class Conversation(NamedTuple):
    """The text around a question and its picture."""

    sentence: str  # the system sentence where the user gives none
    start: str  # the prompt's beginning with a system sentence
    bare: str  # without one
    turn: str  # the user's turn up to the answer


CONVERSATIONS = {
    "llava_v1": Conversation(SYSTEM, "{system} ", "", "USER: {image}{question} ASSISTANT:"),
    "vicuna_v1": Conversation(USER, "{system} ", "", "USER: {image}{question} ASSISTANT:"),
    "llava_v0": Conversation(SYSTEM, "{system}###", "", "Human: {image}{question}###Assistant:"),
    "llava_llama_2": Conversation(
        HELPFUL, "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n", "[INST] ", "{image}{question} [/INST]"
    ),
    "plain": Conversation("", "{system}", "", "{image}{question}\n"),
}
CONVERSATIONS["v1"] = CONVERSATIONS["vicuna_v1"]  # the authors' name for it in `--version v1`

# $names are filled in by chat_template()
CHAT = Template(
    "{% set own = namespace(system=$sentence) %}"
    "{% for message in messages if message['role'] == 'system' %}"
    "{% set own.system = $text %}"
    "{% endfor %}"
    "{{ $before ~ own.system ~ $after if own.system else $bare }}"
    "{% for message in messages if message['role'] == 'user' %}"
    "{% if not loop.first %}{{ raise_exception('one user turn only') }}{% endif %}"
    "{{ $lead }}"
    "{% if message['content'] is not string %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ $image }}{% endfor %}"
    "{% endif %}"
    "{{ ($text) ~ $end }}"
    "{% endfor %}"
)
TEXT = (
    "message['content'] if message['content'] is string else (message['content'] |"
    " selectattr('type', 'equalto', 'text') | map(attribute='text') | join)"
)


def conversation(raw: Config, conv_mode: str | None = None) -> str:
    """The name of the conversation template: the config's, else --conv_mode, else llava_v1. The
    folder's name has no say in it."""
    named: str | None = raw.get("conv_mode") or raw.get("conv_template")
    if not named and raw.get("version") in CONVERSATIONS:
        named = raw["version"]
    for name in filter(None, (named, conv_mode)):
        if name not in CONVERSATIONS:
            known = ", ".join(sorted(CONVERSATIONS))
            raise UsageError(
                f"--conv_mode {name}: no such conversation template; known: {known} (another"
                " prompt: --prompt_template)"
            )
    if named and conv_mode and CONVERSATIONS[named] != CONVERSATIONS[conv_mode]:
        raise UsageError(
            f"--conv_mode {conv_mode}, but the checkpoint's config names {named}; leave it out, or"
            " give --prompt_template for another prompt"
        )
    return named or conv_mode or "llava_v1"


def chat_template(name: str, markup: bool = False) -> str:
    """A conversation template as a processor's chat template, for one user turn. markup: <im_start>
    and <im_end> stand around the picture."""
    template = CONVERSATIONS[name]
    before, after = template.start.split("{system}")
    lead, following = template.turn.split("{image}")
    image = IMAGE.join(MARKUP) if markup else IMAGE
    return CHAT.substitute(
        text=TEXT,
        sentence=json.dumps(template.sentence),
        before=json.dumps(before),
        after=json.dumps(after),
        bare=json.dumps(template.bare),
        lead=json.dumps(lead),
        image=json.dumps(image + "\n"),
        end=json.dumps(following.split("{question}")[1]),
    )
