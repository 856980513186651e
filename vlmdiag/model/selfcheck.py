"""Does what the tools assume of a model hold? A few short passes on a noise picture after loading;
each check fails in one clear line."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmdiag.cli import UsageError
from vlmdiag.groups import VISION
from vlmdiag.model import drafts
from vlmdiag.model.attention import Row, capture, full_mask, kernel, scaling_of
from vlmdiag.model.decoding import Generation, generate
from vlmdiag.model.encoding import token_types
from vlmdiag.model.prefix import first_positions
from vlmdiag.model.probes import Probe
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import AT_HAND, Sample

if TYPE_CHECKING:
    from transformers.generation import GenerateDecoderOnlyOutput

    from vlmdiag.batch import Batch
    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.pictures.samples import Pictures
    from vlmdiag.types import VLM

SIZE = (168, 126)
QUESTIONS = ("Is there a red circle in the image?", "Describe the image.")
ANSWER = [20, 21, 22]  # ids of a made-up answer
ROWS = 64  # queries of a prompt's end of which attention is compared
CHECKED = "vlm_checked"


AttentionMaskInterface.register(CHECKED, sdpa_mask)


def noise_picture(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """A picture (width, height) of uniform noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class _Seen(Probe):
    """Which layers ran, in which order, by attention and by residual stream."""

    wants_hidden = "index"

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.states: list[int] = []

    def attention(self, layer: int, row: Row) -> None:
        if self.step == 0:
            self.layers.append(layer)

    def hidden(self, index: int, states: Tensor) -> None:
        if self.step == 0:
            self.states.append(index)


class _LastRows(Probe):
    """The last row of each layer's attention at the prefill, (B, H, T)."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def attention(self, layer: int, row: Row) -> None:
        if self.step == 0:
            self.rows[layer] = row.weights.float()


def exact(vlm: VLM) -> bool:
    """Whether products are made in float32; int8 rounds what enters a layer too."""
    return vlm.dtype == torch.float32 and not getattr(vlm.model, "is_loaded_in_8bit", False)


def _fail(vlm: VLM, what: str) -> NoReturn:
    raise UsageError(
        f"{vlm.path} ({vlm.family.name}): self-check failed: {what}; a family file of your own"
        " (models/README.md) can mend it, --no_self_check goes on without"
    )


def _relative(difference: Tensor, reference: Tensor) -> float:
    """Largest difference as a share of the reference's largest value; infinite where one is not a
    number."""
    share = float(difference.abs().max() / reference.abs().max().clamp_min(1e-6))
    return float("inf") if math.isnan(share) else share


@torch.inference_mode()
def check(vlm: VLM) -> str | None:
    """UsageError that names the first assumption which does not hold. Returns a line about vision
    tokens without a box, or None. A model without a family file whose positions do not turn as most
    models' do loses "rotary"."""
    tolerance = 1e-4 if exact(vlm) else 3e-2
    picture = noise_picture()
    samples = [Sample(str(i), AT_HAND, question) for i, question in enumerate(QUESTIONS)]
    # of another shape: what a processor gives of pictures has to be joined rightly
    pictures = [picture, noise_picture(SIZE[::-1], seed=1)]
    batch = vlm.encode(samples, pictures)
    decoder_only = "decoder-only" in vlm.family.has
    if decoder_only:
        _check_kernel(vlm, samples[0], picture)
        generation = _check_capture(vlm, batch, tolerance)
        _check_several_tokens(vlm, batch, generation, tolerance * 10)
    else:
        generation = generate(vlm, batch, len(ANSWER), answers=[ANSWER, ANSWER])
    _check_padding(vlm, batch, pictures, tolerance * 10)
    _check_own_word(vlm, samples[0], picture, tolerance * 10)
    if not generation.logprobs.isfinite().all():
        _fail(vlm, "log-probabilities are not finite")
    if decoder_only and "rotary" in vlm.family.has and not _turns(vlm):
        if vlm.family.name != "generic":
            _fail(vlm, "moving all positions does not turn the keys as the family's rotary says")
        vlm.family = replace(vlm.family, has=vlm.family.has - {"rotary"}, rotary=None)
    grid = batch.grids[0]
    return None if grid is None else _check_grid(vlm, batch, grid, picture)


@torch.inference_mode()
def check_chat(vlm: VLM, sample: Sample, pictures: Pictures) -> None:
    """UsageError where a sample, such as one of several pictures and turns, is not what the model's
    own processor and generate() make of it."""
    assert sample.chat is not None
    # special strings that were typed stay text here, and would be special to the processor
    bare = str.maketrans("", "", "<>[]|")
    turns = [
        replace(turn, parts=tuple(part and part.translate(bare) for part in turn.parts))
        for turn in sample.chat.turns
    ]
    sample = replace(sample, chat=replace(sample.chat, turns=tuple(turns)))
    _check_own_word(vlm, sample, pictures, 1e-3 if exact(vlm) else 0.3)


def _check_own_word(
    vlm: VLM, sample: Sample, picture: Pictures, tolerance: float, steps: int = 3
) -> None:
    """Our encoding, features, positions and token types give what the processor's complete output
    gives in the model's own generate(), with eager attention: ids of the prompt, logits, the last
    row of each layer's attention, and greedy ids."""
    batch = vlm.encode([sample], [picture])
    prompt = batch.prompts[0]
    inputs = own_inputs(vlm, [*picture] if isinstance(picture, tuple) else picture, prompt)
    ours = batch.input_ids[0].tolist()
    theirs = inputs["input_ids"][0].tolist()
    if ours != theirs:
        differing = (
            i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len({*pair}) > 1
        )
        place = next(differing, min(len(ours), len(theirs)))
        _fail(
            vlm,
            f"the processor's own ids of the prompt differ from ours at token {place} of"
            f" {len(theirs)}",
        )
    options = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=sorted(vlm.eos_ids),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        decoder_start_token_id=vlm.model.generation_config.decoder_start_token_id,
    )
    with _eager(vlm) as own_rows, _plain_greedy(vlm, options):
        output = vlm.model.generate(**inputs, generation_config=options)
    with capture(vlm, [rows := _LastRows()]) if "decoder-only" in vlm.family.has else nullcontext():
        generation = generate(vlm, batch, steps)
    own_first = output.logits[0][0].float().log_softmax(-1)
    difference = _relative(generation.first[0].to(own_first) - own_first, own_first)
    if difference > tolerance:
        _fail(
            vlm,
            "logits of the model's own forward on its processor's output differ from ours by"
            f" {difference:.1e} (relative)",
        )
    for layer, own in own_rows.items():
        apart = _relative(rows.rows[layer].to(own) - own, own)
        if apart > tolerance:
            _fail(
                vlm,
                f"the last row of layer {layer}'s attention differs from the model's own by"
                f" {apart:.1e} (relative)",
            )
    _compare_answers(vlm, generation.ids[0], output, tolerance / 10)


def _compare_answers(
    vlm: VLM, ours: list[int], output: GenerateDecoderOnlyOutput, tolerance: float
) -> None:
    """The greedy ids are those of transformers' generate(), up to a step at which its two best
    logits are no further apart than rounding may move them."""
    theirs = output.sequences[0].tolist()[-len(output.logits) :]
    for step, (mine, own) in enumerate(zip(ours, theirs, strict=False)):
        best = output.logits[step][0].float().topk(2).values
        if float(best[0] - best[1]) <= tolerance * float(best[0].abs()):
            return
        if mine != own:
            _fail(
                vlm,
                f"token {step} of a greedy answer is {vlm.text([mine])!r} here and"
                f" {vlm.text([own])!r} in transformers' generate()",
            )


def own_inputs(
    vlm: VLM, picture: Image.Image | list[Image.Image], prompt: str
) -> dict[str, Tensor]:
    """All that the model's processor makes of a picture, or of several, and a prompt, as its
    forward takes it."""
    bos = vlm.tokenizer.bos_token
    inputs = vlm.processor(
        images=picture,
        text=prompt,
        return_tensors="pt",
        add_special_tokens=not (bos and prompt.startswith(bos)),
        **token_types(vlm),
    )
    if vlm.family.read_text is not None:
        inputs |= vlm.family.read_text(vlm, prompt)
    inputs.pop("offset_mapping", None)  # of characters, for us
    tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    return {
        name: value.to(vlm.device, vlm.dtype if value.is_floating_point() else value.dtype)
        for name, value in tensors.items()
    }


@contextmanager
def _plain_greedy(vlm: VLM, options: GenerationConfig) -> Iterator[None]:
    """Within the context generate() has no other settings than these: it fills what they leave open
    with those of the checkpoint, such as penalties, and what is measured is plain greedy."""
    owners = [module for module in vlm.model.modules() if hasattr(module, "generation_config")]
    before = [module.generation_config for module in owners]
    for module in owners:
        module.generation_config = options
    try:
        yield
    finally:
        for module, settings in zip(owners, before, strict=True):
            module.generation_config = settings


@contextmanager
def _eager(vlm: VLM) -> Iterator[dict[int, Tensor]]:
    """Within the context the decoder's attention is eager. Yields {layer: its last row (B, H, T)},
    filled by the first pass: of a whole map only that row is kept."""
    rows: dict[int, Tensor] = {}

    def keeping(layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: object) -> None:
            for part in output if isinstance(output, tuple) else ():
                if torch.is_tensor(part) and part.ndim == 4 and part.shape[2] == part.shape[3]:
                    rows.setdefault(layer, part[:, :, -1].to(torch.float32, copy=True))

        return keep

    hooks = []
    if "decoder-only" in vlm.family.has:
        hooks = [
            module.register_forward_hook(keeping(layer))
            for layer, block in enumerate(vlm.parts.layers)
            for module in block.modules()
            if "attention" in type(module).__name__.lower()
        ]
    decoder = vlm.parts.decoder
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield rows
    finally:
        decoder.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


def _check_padding(
    vlm: VLM, batch: Batch, pictures: Sequence[Image.Image], tolerance: float
) -> None:
    """Logits of a left-padded batch are those of each prompt alone."""
    logits = prefill(vlm, batch).logits[:, -1].float()
    for row, (sample, picture) in enumerate(zip(batch.samples, pictures, strict=True)):
        alone = prefill(vlm, vlm.encode([sample], [picture])).logits[:, -1].float()[0]
        difference = _relative(alone - logits[row], alone)
        if difference > tolerance:
            _fail(
                vlm,
                "the logits of a left-padded batch differ from those of the prompt alone by"
                f" {difference:.1e} (relative)",
            )


def _turns(vlm: VLM) -> bool:
    """Whether moving all positions turns the keys of every layer in a way that the family names."""
    try:
        return bool(vlm.rotary)
    except UsageError:
        return False


def _check_capture(vlm: VLM, batch: Batch, tolerance: float) -> Generation:
    """The decoder layers are those that run, and captured attention times V is what each layer's
    attention put out, at the prefill and at a cached step; returns the generation of ANSWER."""
    seen = _Seen()
    worst: dict[int, float] = {}

    def compare(layer: int, row: Row, value: Tensor, output: Tensor) -> None:
        batch_size, heads, _ = row.weights.shape
        shared = value.shape[1]
        weights = row.weights.view(batch_size, shared, heads // shared, -1)
        expected = (weights @ value.float()).flatten(1, 2)  # (B, H, D)
        actual = output[:, -1].float()
        worst[seen.step] = max(worst.get(seen.step, 0.0), _relative(expected - actual, actual))

    with capture(vlm, [seen], inspect=compare):
        generation = generate(vlm, batch, len(ANSWER), answers=[ANSWER, ANSWER])
    layers = vlm.parts.layers
    count = len(layers)
    kinds = {type(layer) for layer in layers}
    alike = sum(type(module) in kinds for module in vlm.parts.decoder.modules())
    if alike != count:
        _fail(
            vlm, f"{count} decoder layers found, but the decoder has {alike} layers of that class"
        )
    if seen.states != list(range(count + 1)):
        run = [index - 1 for index in seen.states[1:]]
        _fail(vlm, f"of {count} decoder layers found, those that run are {run}")
    attending = vlm.parts.attending
    if seen.layers != attending:
        missing = sorted(set(attending) ^ set(seen.layers)) or seen.layers
        _fail(
            vlm,
            f"attention of layers {missing} does not go through transformers' AttentionInterface"
            " once per pass",
        )
    for step, name in ((0, "prefill"), (1, "a cached step")):
        if worst[step] > tolerance:
            _fail(
                vlm,
                f"captured attention times V differs from the attention output at {name} by"
                f" {worst[step]:.1e} (relative; allowed {tolerance:.0e})",
            )
    return generation


def _check_kernel(vlm: VLM, sample: Sample, picture: Image.Image) -> None:
    """Of the same queries, keys and values our attention makes what the model's own eager function
    makes, in float32 and so to 1e-4 whatever the model's dtype: an option that ours does not know,
    such as attention sinks, would pass a comparison of whole passes in 16 bits."""
    layer_of = {module: i for i, layer in enumerate(vlm.parts.layers) for module in layer.modules()}
    worst: dict[int, float] = {}

    def both(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        layer = layer_of.get(module)
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if layer is not None and own is not None:
            seen = full_mask(module, query, key, mask, more)[:, :, -ROWS:]
            q, k, v = query[:, :, -ROWS:].float(), key.float(), value.float()
            added = seen
            if seen.dtype == torch.bool:
                added = torch.zeros(seen.shape, device=seen.device)
                added = added.masked_fill(~seen, torch.finfo(torch.float32).min)
            options = {"scaling": scaling_of(query, more)} | more
            theirs = own(module, q, k, v, added, **options)[0].float()
            apart = _relative(kernel(module, q, k, v, seen, **more).float() - theirs, theirs)
            worst[layer] = max(worst.get(layer, 0.0), apart)
        return kernel(module, query, key, value, mask, **more), None

    AttentionInterface.register(CHECKED, both)
    decoder = vlm.parts.decoder
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(CHECKED)
    try:
        prefill(vlm, vlm.encode([sample], [picture]))
    finally:
        decoder.set_attn_implementation(before)
    for layer, apart in worst.items():
        if apart > 1e-4:
            _fail(
                vlm,
                f"attention of layer {layer} differs from what the model's own function makes of"
                f" the same queries and keys by {apart:.1e} (relative)",
            )


def _check_several_tokens(vlm: VLM, batch: Batch, generation: Generation, tolerance: float) -> None:
    """Tokens of ANSWER that one pass reads behind the prompt's keys and values give what each gave
    in a pass of its own. generation: of those passes."""
    if not drafts.can_verify(vlm, generation.cache):
        return
    of_prompt = first_positions(vlm, generation.cache, batch.groups.shape[1])
    output = CausalLMOutputWithPast(logits=generation.first[:, None], past_key_values=of_prompt)
    logprobs = drafts.read_given(vlm, batch, output, [ANSWER, ANSWER])
    difference = _relative(logprobs - generation.logprobs, generation.logprobs)
    if difference > tolerance:
        _fail(
            vlm,
            "tokens read in one pass behind a cache differ from each read alone by"
            f" {difference:.1e} (relative)",
        )


def _check_grid(vlm: VLM, batch: Batch, grid: PatchGrid, picture: Image.Image) -> str | None:
    """Painting a cell changes most the vision token that the grid gives it, for about nine cells.
    Returns a line about tokens without a box, or None."""
    boxed = grid.has_box
    tokens = int((batch.groups[0] == VISION).sum())
    if len(boxed) != tokens:
        _fail(vlm, f"{tokens} vision tokens, but a grid of {len(boxed)}")
    cells, painted = [], []
    for cell in boxed.nonzero()[0][:: max(1, int(boxed.sum()) // 9)].tolist():
        x0, y0, x1, y1 = (round(float(edge)) for edge in grid.boxes[cell])
        box = (max(0, x0), max(0, y0), min(picture.width, x1), min(picture.height, y1))
        if box[2] > box[0] and box[3] > box[1]:  # else padding
            copy = picture.copy()
            copy.paste((255, 0, 0), box)
            cells.append(cell)
            painted.append(copy)
    plain = vlm.vision(batch).pooler_output[0].float()
    batch_of_painted = vlm.encode([batch.samples[0]] * len(painted), painted)
    changed = vlm.vision(batch_of_painted).pooler_output
    hits = sum(
        _is_hit(grid, cell, (after.float() - plain).norm(dim=-1))
        for after, cell in zip(changed, cells, strict=True)
    )
    if hits * 2 <= len(cells):
        _fail(
            vlm,
            "changing the pixels of a cell does not change most the vision token that the grid"
            " gives it",
        )
    without = int((~boxed).sum())
    if not without:
        return None
    return f"{without} of {tokens} vision tokens have no box of their own"


def _is_hit(grid: PatchGrid, cell: int, change: Tensor) -> bool:
    """Whether the token that changed most is the cell's, or one whose box is mostly the same place.
    Only boxes of about its size are asked, for a thumbnail's box lies over many of a tile's."""
    low, high = grid.boxes[:, :2], grid.boxes[:, 2:]
    area = (high - low).prod(-1)
    alike = grid.has_box & (area > area[cell] / 2) & (area < area[cell] * 2)
    unlike = ~torch.from_numpy(alike).to(change.device)
    most = int(change.masked_fill(unlike, -1).argmax())
    shared = (np.minimum(high[most], high[cell]) - np.maximum(low[most], low[cell])).clip(0).prod()
    return most == cell or bool(shared > 0.5 * area[cell])
