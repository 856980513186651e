"""The report of diagnostic_tools/check_model.py as lines of text, from the values of check.py."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdiag.runs.disk import plain
from vlmdiag.types import Fields

if TYPE_CHECKING:
    pass


from vlmdiag.model.check import CAPABILITIES

PROBLEMS = {"missing": "in no file", "unexpected": "without a place", "misshapen": "another shape"}


def lines_of(report: Fields) -> Iterator[str]:
    """The report of a model as lines of text, a section for each part that it has."""
    sections: dict[str, Callable[[Any], Iterator[str]]] = {
        "family": lines_of_family,
        "weights": lines_of_weights,
        "memory": lines_of_memory,
        "capabilities": lines_of_capabilities,
        "prompt": lines_of_prompt,
        "answer_ends": lines_of_endings,
        "pictures": lines_of_pictures,
        "grid": lines_of_grid,
        "self_check": lines_of_check,
        "proposed_grid": lines_of_proposal,
    }
    yield str(report["model"])
    for name, lines in sections.items():
        if name in report:
            yield ""
            yield from lines(report[name])
    for title, key in (("Cannot be said here", "unknown"), ("Problems", "problems")):
        if report.get(key):
            yield ""
            yield title
            yield from (f"  {line}" for line in report[key])


def lines_of_family(family: Fields) -> Iterator[str]:
    """Which family, and why."""
    yield "Family"
    yield f"  {family['name']} ({family['file']}): {family['because']}"
    if family["architectures"]:
        yield f"  architectures   {', '.join(family['architectures'])}"
    if family.get("dtype"):
        yield f"  loaded as       {family['dtype']} on {family['device']}"
    if family.get("left_out"):
        yield f"  logits          {family['left_out']}"


def lines_of_capabilities(capabilities: Fields) -> Iterator[str]:
    """What the family has and lacks, with the commands that each opens."""
    yield "Capabilities, and the commands that need them"
    for name, meaning in CAPABILITIES.items():
        answer = "yes" if name in capabilities["has"] else "no"
        yield f"  {name:15s} {answer:4s}{meaning}"
    by_needs: dict[tuple[str, ...], list[str]] = {}
    for command, of_command in capabilities["commands"].items():
        by_needs.setdefault(tuple(of_command["needs"]), []).append(command)
    for needs, commands in by_needs.items():
        first = capabilities["commands"][commands[0]]
        verdict = "run"
        if first["lacks"]:
            verdict = f"need {', '.join(first['lacks'])}, which this model lacks"
        if first["without"]:
            verdict = f"run with {first['without']} only"
        yield f"  {' + '.join(needs) or 'any model'}: {verdict}"
        names = ", ".join(Path(command).name for command in commands)
        yield from textwrap.wrap(names, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)


def lines_of_weights(weights: Fields) -> Iterator[str]:
    """How names and shapes of the files fit the model."""
    yield "Weights, by their names and shapes"
    size = weights["parameters"] / 1e9
    yield f"  the model       {size:.4f} B parameters, {weights['names']} names"
    stored = weights["stored"]
    if stored is not None:
        said = [f"{stored['names']} names"]
        said += [f"{count:,} numbers {name}" for name, count in stored["parameters"].items()]
        yield f"  its files       {', '.join(said)}"
    if stored is not None and not weights["not_compared"]:
        if stored["named_only"]:
            yield f"  not compared    shapes of {stored['named_only']}, whose files are not here"
        for kind, title in PROBLEMS.items():
            yield f"  {title:15s} {shown_names(weights[kind])}"
    if weights["index_bytes"] is not None:
        yield (
            f"  its index says {weights['index_bytes']:,} bytes, the model takes"
            f" {weights['bytes']:,} in {weights['dtype']}"
        )


def shown_names(names: Sequence[str], most: int = 4) -> str:
    """How many, and the first of them."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)}: {shown}" if names else "none"


def lines_of_memory(memory: Fields) -> Iterator[str]:
    """About how much memory is needed."""
    yield "Memory in GB, without the activations of a layer (vlmdiag/model/memory.py)"
    for name, size in memory["weights"].items():
        yield f"  weights in {name:9s} {size / 1e9:9.2f}"
    measures = memory["measures"]
    if not measures:
        return
    yield (
        f"  with keys, values and what is captured, for a prompt of"
        f" {memory['prompt_tokens']} tokens:"
    )
    yield "     bfloat16   float32  batch  new tokens"
    for measure in measures:
        totals = [measure["bytes"][name]["total"] / 1e9 for name in ("bfloat16", "float32")]
        counts = f"{measure['batch']:5d}  {measure['new_tokens']:10d}"
        yield f"    {totals[0]:9.2f} {totals[1]:9.2f}  {counts}  {measure['command']}"


def lines_of_prompt(prompt: Fields) -> Iterator[str]:
    """The prompt as text, its system prompt, its tokens."""
    yield f"Prompt, from {prompt['source']}"
    yield f"  {prompt['text']!r}"
    if prompt["guess"] is not None:
        yield "  a guess: the checkpoint has no prompt for pictures; another one: --prompt_template"
    if prompt["system"]:
        yield f"  system prompt   from {prompt['system_from']}"
    else:
        yield "  system prompt   none"
    if prompt["template_system"] != prompt["system"]:
        yield f"  the template's  {prompt['template_system']!r}"
    yield (
        f"  {prompt['length']} tokens, {prompt['image_tokens']} of them the picture's; of each"
        " group, and where, as [from, to):"
    )
    for group, spans in prompt["spans"].items():
        count = sum(end - start for start, end in spans)
        yield f"    {group:13s} {count:6d}  {shown_spans(spans)}"
    chat = prompt.get("chat")
    groups = list(prompt["groups"])
    for number, picture in enumerate(chat["pictures"] if chat else ()):
        yield f"    picture {number}     {shown_spans(picture['spans'])}, in turn {picture['turn']}"
    for number, turn in enumerate(chat["turns"] if chat else ()):
        who = f"turn {number - 1}, {turn['role']}" if number else "before them"
        yield f"    {who:17s} {shown_spans(turn['spans'])}"
    if chat:
        groups = [
            f"{group:13s} {'-' if number < 0 else number:>3} {'-' if turn < 0 else turn:>4}"
            for group, number, turn in zip(groups, prompt["numbers"], prompt["turns"], strict=True)
        ]
    yield f"  position  group        {' picture turn' if chat else ''}      id  token"
    yield from lines_of_tokens(prompt["ids"], prompt["tokens"], groups)


def shown_spans(spans: Sequence[Sequence[int]], most: int = 4) -> str:
    """The first spans, and how many there are in all."""
    shown = " ".join(f"[{start}, {end})" for start, end in spans[:most])
    return shown if len(spans) <= most else f"{shown} ... {len(spans)} in all"


def lines_of_tokens(
    ids: Sequence[int], tokens: Sequence[str], groups: Sequence[str]
) -> Iterator[str]:
    """A line for each token; the same token again and again takes one line."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and (ids[end], groups[end]) == (ids[start], groups[start]):
            continue
        place = str(start) if end - start == 1 else f"{start}-{end - 1}"
        times = "" if end - start == 1 else f"  x {end - start}"
        yield f"  {place:>8s}  {groups[start]:13s} {ids[start]:7d}  {tokens[start]!r}{times}"
        start = end


def lines_of_endings(endings: Sequence[Fields]) -> Iterator[str]:
    """The ids that end an answer."""
    yield "An answer ends at"
    if not endings:
        yield "  no id: it goes on until --max_new_tokens"
    for end in endings:
        yield f"  {end['id']:7d}  {end['token']!r}  from {', '.join(end['from'])}"


def lines_of_pictures(pictures: Fields) -> Iterator[str]:
    """How a picture is prepared."""
    yield f"Pictures, by {pictures['processor']}"
    for name, value in pictures["settings"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{side} {length}" for side, length in value.items())
        yield f"  {name:15s} {plain(value)}"
    for name, shape in pictures["inputs"].items():
        yield f"  gives {name} {tuple(shape)}"


def lines_of_grid(grid: Fields | None) -> Iterator[str]:
    """Where the vision tokens lie."""
    yield "Grid of the vision tokens"
    if grid is None:
        yield "  unknown, so no picture is drawn"
        return
    shape = ""
    if grid["shape"] and isinstance(grid["shape"][0], int):
        shape = f", {grid['shape'][0]} rows of {grid['shape'][1]}"
    yield f"  {grid['tokens']} vision tokens{shape}, {grid['boxed']} with a box"
    yield f"  wrote {grid['file']}"


def lines_of_check(check: Fields) -> Iterator[str]:
    """What the self-check found."""
    yield "Self-check"
    yield f"  {check['found']}"


def lines_of_proposal(proposal: Fields) -> Iterator[str]:
    """The grid that the vision tokens show, or that none can be trusted."""
    yield "Proposed grid"
    yield from textwrap.wrap(proposal["why"], 96, initial_indent="  ", subsequent_indent="  ")
    for size, share in proposal["inside"].items():
        yield f"  {share:.0%} of the tokens answer inside their boxes on {size} pixels"
    yield f"  a token's strongest answer is {proposal['contrast']:.1f} times its usual one"
    if proposal["as_the_family"] is not None:
        same = "the same boxes as" if proposal["as_the_family"] else "other boxes than"
        yield f"  {same} the family's own grid"
    if "picture" in proposal:
        yield f"  drew it on {proposal['picture']}: look at it"
    if "file" in proposal:
        yield f"  wrote {proposal['file']}: review it, give it with --family, or move it to models/"
