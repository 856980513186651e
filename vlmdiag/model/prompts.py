"""From a sample to a batch: the prompt as text, its tokens and their groups, padded on the left."""

import hashlib

import torch

from vlmdiag.batch import Batch, joined
from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS, PAD

_QUESTION, _SYSTEM = (
    "\ue010\ue011",
    "\ue012\ue013",
)  # stand-ins of private use while a template is rendered


def prompt_for(vlm, question, strip_system=False):
    """The prompt of a question as text, and the character spans of system prompt and question:
    (text, (start, end) or None, (start, end)).

    From --prompt_template, the processor's chat template, or the family's own. strip_system leaves
    the system prompt out.
    """
    template, system = vlm.options.get("prompt_template"), vlm.options.get("system_prompt")
    if system is None and vlm.family.default_system:
        system = vlm.family.default_system(vlm)

    def render(system):
        if template is not None:
            image = getattr(vlm.processor, "image_token", "<image>")
            return (
                template.replace("{system}", system or "")
                .replace("{image}", image)
                .replace("{question}", _QUESTION)
                .replace("\\n", "\n")
            )
        if getattr(vlm.processor, "chat_template", None) is None:
            if vlm.family.prompt is None:
                raise UsageError(
                    f"{vlm.path} has no chat template; give the prompt with --prompt_template '..."
                    " {image} ... {question} ...'"
                )
            return vlm.family.prompt(vlm, _QUESTION, system)
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}
        messages = (
            [{"role": "system", "content": [{"type": "text", "text": system}]}]
            if system is not None
            else []
        ) + [user]
        return vlm.processor.apply_chat_template(messages, add_generation_prompt=True)

    if template is not None and "{question}" not in template:
        raise UsageError("--prompt_template has no {question}")
    text = render(None if strip_system or (system is None) else _SYSTEM)
    if system is None or strip_system:
        marked = render(_SYSTEM)
        before, _, after = marked.partition(_SYSTEM)
        own = (
            text[len(before) : len(text) - len(after)]
            if marked != before and text.startswith(before) and text.endswith(after)
            else ""
        )
        if strip_system and own:  # the template writes a system prompt of its own
            text = render("")
            own = ""
        system, text = own, text if not own else before + _SYSTEM + after
    if _QUESTION not in text:
        raise UsageError(
            f"{vlm.path}: the chat template does not keep the question as it is; give"
            " --prompt_template"
        )
    where = {}
    for name, stand_in, value in sorted(
        (("system", _SYSTEM, system or ""), ("question", _QUESTION, question)),
        key=lambda part: text.find(part[1]),
    ):
        at = text.find(stand_in)
        if at >= 0:
            text = text[:at] + value + text[at + len(stand_in) :]
            where[name] = (at, at + len(value))
    span = where.get("system")
    return text, span if span and span[0] < span[1] else None, where["question"]


def _encode_one(vlm, image, question, strip_system):
    """ids, groups, image inputs and prompt of one sample; special strings in the question stay
    text."""
    text, system, (start, end) = prompt_for(vlm, question, strip_system)
    tokenizer, processor = vlm.tokenizer, vlm.processor
    specials = sorted(
        {str(token) for token in tokenizer.all_special_tokens} | set(tokenizer.get_added_vocab()),
        key=len,
        reverse=True,
    )
    typed, safe, rest = [], "", text[start:end]
    stand_in = next(chr(code) for code in range(0xE020, 0xF8FF) if chr(code) not in text)
    while rest:  # stand-ins for special strings, put back as text after tokenizing
        found = next((token for token in specials if token and rest.startswith(token)), None)
        safe += stand_in if found else rest[0]
        typed += [found] if found else []
        rest = rest[len(found) if found else 1 :]
    text_safe = text[:start] + safe + text[end:]
    bos = tokenizer.bos_token
    inputs = processor(
        images=image,
        text=text_safe,
        return_tensors="pt",
        return_offsets_mapping=True,
        add_special_tokens=not (bos and text_safe.startswith(bos)),
    )
    ids, offsets = inputs.pop("input_ids")[0].tolist(), inputs.pop("offset_mapping")[0].tolist()
    for key in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        inputs.pop(key, None)
    inputs |= vlm.family.read_text(vlm, text) if vlm.family.read_text else {}
    vision = [i for i, token in enumerate(ids) if token == vlm.image_token_id]
    if not vision:
        raise ValueError(
            f"the processor put no image token (id {vlm.image_token_id}) into the prompt"
        )
    # characters after the picture's placeholder moved by what it grew
    shift = max(b for _, b in offsets) - len(text_safe)
    placeholder = offsets[vision[0]][0] if offsets[vision[0]][1] else 0
    if processor_token := getattr(processor, "image_token", None):
        placeholder = text_safe.rfind(
            processor_token, 0, offsets[vision[0]][0] + len(processor_token)
        )
    grown = (placeholder, offsets[vision[-1]][1])
    moved = (
        start + (shift if start >= placeholder else 0),
        start + len(safe) + (shift if start >= placeholder else 0),
    )
    markup = {
        tokenizer.convert_tokens_to_ids(token)
        for token in vlm.family.markup
        if token in tokenizer.get_added_vocab()
    }
    source = lambda a: a - shift if a >= grown[1] else a
    first = next(
        (i for i, token in enumerate(ids) if token != vlm.image_token_id), None
    )  # BLIP's vision tokens come before the BOS

    def group(i):
        token, (a, b) = ids[i], offsets[i]
        if token == vlm.image_token_id:
            return "vision"
        if token in markup or (grown[0] <= a and b <= grown[1] and a < b):
            return "image_markup"
        if i == first and token == tokenizer.bos_token_id:
            return "bos"
        text_here = text_safe[source(a) : source(a) + b - a]
        places = (
            {a} if text_here and not text_here.strip(" ") else set()
        )  # blanks alone at the question's end are still its own
        a += len(text_here) - len(text_here.lstrip(" "))
        if any(moved[0] <= place < moved[1] for place in places | {a}):
            return "user"
        return "system" if system and system[0] <= source(min(a, b - 1)) < system[1] else "template"

    groups = [GROUPS.index(group(i)) for i in range(len(ids))]
    if typed:
        ids, groups = _put_back(
            tokenizer,
            ids,
            groups,
            offsets,
            [moved[0] + i for i, c in enumerate(safe) if c == stand_in],
            typed,
        )
    return ids, groups, dict(inputs), text


def _put_back(tokenizer, ids, groups, offsets, places, typed):
    """Replace the tokens at each place (character of a stand-in) by the typed special string,
    encoded as plain text."""
    lead = tokenizer(":", add_special_tokens=False)["input_ids"]
    out_ids, out_groups, done = [], [], set()
    for token, group, (a, b) in zip(ids, groups, offsets, strict=True):
        inside = [k for k, place in enumerate(places) if a <= place < b]
        if not inside:
            out_ids.append(token)
            out_groups.append(group)
        for k in inside:
            if k not in done:
                done.add(k)
                plain = tokenizer(
                    ":" + typed[k], add_special_tokens=False, split_special_tokens=True
                )["input_ids"]
                plain = plain[len(lead) :] if plain[: len(lead)] == lead else plain
                if set(plain) & {
                    *tokenizer.all_special_ids,
                    *tokenizer.get_added_vocab().values(),
                }:  # T5 has its special strings as pieces too, Kosmos-2's tags are not special
                    plain = [
                        id
                        for char in typed[k]
                        for id in tokenizer(":" + char, add_special_tokens=False)["input_ids"][
                            len(lead) :
                        ]
                    ]
                out_ids += plain
                out_groups += [GROUPS.index("user")] * len(plain)
    return out_ids, out_groups


def encode(vlm, samples, images, strip_system=False):
    """samples: objects with .question; images: their PIL pictures -> Batch. The processor sees each
    sample alone; we pad on the left."""
    rows = [
        _encode_one(vlm, image, sample.question, strip_system)
        for sample, image in zip(samples, images, strict=True)
    ]
    longest, size = max(len(ids) for ids, *_ in rows), len(rows)
    pad = vlm.tokenizer.pad_token_id if vlm.tokenizer.pad_token_id is not None else 0
    input_ids, mask = torch.full((size, longest), pad), torch.zeros(size, longest, dtype=torch.long)
    groups = torch.full((size, longest), PAD)
    for row, (ids, codes, _, _) in enumerate(rows):
        input_ids[row, longest - len(ids) :], mask[row, longest - len(ids) :] = torch.tensor(ids), 1
        groups[row, longest - len(ids) :] = torch.tensor(codes)
    image_rows = [
        {key: value for key, value in inputs.items() if torch.is_tensor(value)}
        for _, _, inputs, _ in rows
    ]
    pictures = [
        hashlib.blake2b(b"".join(value.numpy().tobytes() for value in row.values())).digest()
        for row in image_rows
    ]
    input_ids, mask, groups = (x.to(vlm.device) for x in (input_ids, mask, groups))
    positions, following = vlm.family.positions(vlm, input_ids, mask, joined(image_rows))
    grids = [
        vlm.family.grid(vlm, image.size, inputs) if vlm.family.grid else None
        for image, (_, _, inputs, _) in zip(images, rows, strict=True)
    ]
    for grid, row in zip(grids, range(size), strict=True):
        found = int((groups[row] == GROUPS.index("vision")).sum())
        if grid is not None and len(grid.boxes) != found:
            raise ValueError(
                f"the prompt has {found} vision tokens, the grid of {vlm.family.name}"
                f" {len(grid.boxes)}"
            )
    prompts, lengths = [text for *_, text in rows], [len(ids) for ids, *_ in rows]
    return Batch(
        input_ids,
        mask,
        positions,
        following,
        groups,
        image_rows,
        pictures,
        prompts,
        lengths,
        grids,
        list(samples),
    )
