"""The variants of bench_interventions.py, what is done to the picture, and that outputs are equal.

Knockouts: variant(case, plan) -> {key: logits after the prompt (V,)}. Ablations: variant(case,
plan) -> {condition: [ids of the answer to each question]}, "none" the one without ablation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.cases import Case, encode_samples, model_inputs
from vlmdiag.interp.interventions import asking, prepare, run_conditions
from vlmdiag.interp.knockout import blocks_for, knocked_out, positions_of
from vlmdiag.interp.knockout_pairs import PAPER_PAIRS, PAPER_WINDOWS, layer_windows
from vlmdiag.interp.objects import buffered, random_tokens, rng_for
from vlmdiag.model import drafts
from vlmdiag.model.decoding import generate
from vlmdiag.model.lens import Lens
from vlmdiag.model.prefix import SharedPicture
from vlmdiag.pictures.samples import Sample

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from vlmdiag.batch import Batch
    from vlmdiag.interp.conditions import Tokens
    from vlmdiag.model.attention import Block

TOLERANCE = 2e-4
CONDITIONS = 18
BUFFERS = (0, 1, 2)  # rings of tokens around the object
COUNTS = (5, 10, 20, 40, 60)  # random tokens of a condition
NEW_TOKENS_YES_NO = 10
PER_PASS = 9  # conditions that ours takes through the model at once
YES_NO = "Is there a red circle in this image?"

Logits = dict[Any, "Float[Tensor, ' V']"]
Answers = dict[str, list[list[int]]]
HookResult = tuple[tuple[Any, ...], dict[str, Any]]
Hook = Callable[..., HookResult]  # of the inputs of a module


@dataclass
class Plan:
    """What is done to the picture. P vision tokens, d width."""

    blocks: dict[Any, Block]  # of the knockouts
    sets: dict[str, Tokens]  # vision tokens that a condition replaces
    replacement: Float[Tensor, " d"]
    questions: list[tuple[str, int]]  # with the most tokens of an answer


def make_plan(case: Case, description_tokens: int) -> Plan:
    """The paper's knockouts, and 3 + 15 ablations of an object in the middle and random tokens."""
    vlm = case.vlm
    sample = case.samples[0]
    batch = encode(case)
    grid = batch.grids[0]
    assert grid is not None, "a LLaVA has a grid"
    count = len(batch.vision_positions(0))
    rows, columns = grid.shape
    # two rows of three tokens
    corner = rows // 2 * columns + columns // 2
    middle = np.array([corner + down * columns + right for down in (0, 1) for right in (0, 1, 2)])
    patches = {buffers: buffered(grid, middle, buffers) for buffers in BUFFERS}
    positions = positions_of(batch.groups[0].cpu().numpy(), grid, patches)
    windows = layer_windows(list(PAPER_WINDOWS), len(vlm.parts.layers))
    blocks = blocks_for(positions, PAPER_PAIRS, windows, batch.input_ids.shape[1])
    sets = {f"patch_{buffers}": tokens for buffers, tokens in patches.items()}
    for n in range(CONDITIONS - len(BUFFERS)):
        drawn = min(count, COUNTS[n % len(COUNTS)])
        sets[f"random_{n}"] = random_tokens(rng_for(0, n), drawn, np.arange(count))
    with torch.no_grad():
        replacement = torch.cat(vlm.vision(batch).pooler_output).mean(0)
    questions = [
        (sample.question, description_tokens),
        (YES_NO, min(NEW_TOKENS_YES_NO, description_tokens)),
    ]
    return Plan(blocks, sets, replacement, questions)


def encode(case: Case, question: str | None = None) -> Batch:
    """The case's sample, or another question about its picture; the picture is read from its
    file."""
    sample = case.samples[0]
    if question is not None:
        sample = Sample("0", sample.image, question)
    return encode_samples(case.vlm, [sample])


def _logits(case: Case) -> Float[Tensor, " V"]:
    """One forward pass over the prompt: logits after it."""
    inputs = model_inputs(case.vlm, encode(case))
    output = case.vlm.model(**inputs, use_cache=False, logits_to_keep=1)
    return output.logits[0, -1].float()


def _answer_ids(case: Case, batch: Batch, limit: int) -> list[int]:
    inputs = model_inputs(case.vlm, batch)
    ids = case.vlm.model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    return ids[0, batch.input_ids.shape[1] :].tolist()


# --- knockouts ------------------------------------------------------------------------------------


@torch.inference_mode()
def knockouts_floor(case: Case, plan: Plan) -> Logits:
    """One forward pass, nothing blocked."""
    return {"none": _logits(case)}


@torch.no_grad()
def knockouts_ours(case: Case, plan: Plan) -> Logits:
    """The scripts' own functions: all knockouts as branches of one unblocked pass."""
    vlm = case.vlm
    batch = encode(case)
    prompt = prepare(vlm, batch, vlm.vision(batch))
    return knocked_out(vlm, Lens(vlm), prompt, plan.blocks)


def knockouts_published(case: Case, plan: Plan) -> Logits:
    """A pass for each knockout; masks are filled pair by pair."""
    return _one_by_one(case, plan, _filled_by_pairs)


def knockouts_vectorised(case: Case, plan: Plan) -> Logits:
    """A pass for each knockout; a mask is filled by one index."""
    return _one_by_one(case, plan, _filled_by_index)


def _causal(size: int, device: torch.device) -> Tensor:
    return torch.ones(1, 1, size, size, dtype=torch.bool, device=device).tril()


def _filled_by_pairs(block: Block) -> Hook:
    pairs = [
        (int(query), int(key))
        for query in block.queries[0].nonzero()
        for key in block.keys[0].nonzero()
    ]

    def replace(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult:
        states = args[0] if args else kwargs["hidden_states"]
        mask = _causal(states.shape[1], states.device)
        for query, key in pairs:
            mask[0, 0, query, key] = False
        return args, kwargs | {"attention_mask": mask}

    return replace


def _filled_by_index(block: Block) -> Hook:
    def replace(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult:
        states = args[0] if args else kwargs["hidden_states"]
        mask = _causal(states.shape[1], states.device)
        blocked = block.queries[0][:, None] & block.keys[0][None]
        mask[0, 0] &= ~blocked.to(mask.device)
        return args, kwargs | {"attention_mask": mask}

    return replace


@torch.inference_mode()
def _one_by_one(case: Case, plan: Plan, make_hook: Callable[[Block], Hook]) -> Logits:
    """The published knockouts: a hook on every blocked layer's attention puts in a mask of its
    own."""
    logits: Logits = {}
    for key, block in plan.blocks.items():
        replace = make_hook(block)
        hooks = []
        try:
            for layer in sorted(block.layers or ()):
                attention = case.vlm.parts.layers[layer].self_attn
                hooks.append(attention.register_forward_pre_hook(replace, with_kwargs=True))
            logits[key] = _logits(case)
        finally:
            for hook in hooks:
                hook.remove()
    return logits


# --- ablations ------------------------------------------------------------------------------------


@torch.inference_mode()
def ablation_floor(case: Case, plan: Plan) -> Answers:
    """Each question asked once, nothing replaced."""
    return {
        "none": [
            _answer_ids(case, encode(case, question), limit) for question, limit in plan.questions
        ]
    }


@torch.no_grad()
def ablation_ours(case: Case, plan: Plan) -> Answers:
    """The scripts' own functions: conditions batched over shared prefixes, the picture once, the
    unablated answers as drafts."""
    vlm = case.vlm
    batches = [encode(case, question) for question, _ in plan.questions]
    features = vlm.vision(batches[0])
    shared = SharedPicture(vlm, batches[0])
    prompts = []
    for batch in batches:
        prompts.append(prepare(vlm, batch, features, shared))
        if len(prompts) == 1:
            shared.keep(prompts[0].cache)
    replacement = plan.replacement.to(prompts[0].embeds)
    replacements = replacement.expand(len(prompts[0].positions), -1)
    limits = [limit for _, limit in plan.questions]
    plain = [
        generate(vlm, prompt.batch, limit, **prompt.inputs(vlm)).ids[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    asks = [asking(limit, ids) for limit, ids in zip(limits, plain, strict=True)]
    answers = run_conditions(vlm, prompts, asks, plan.sets, replacements, PER_PASS)
    ablated = {name: [answer.ids for answer in of_set] for name, of_set in answers.items()}
    return {"none": plain} | ablated


@torch.inference_mode()
def ablation_published(case: Case, plan: Plan) -> Answers:
    """generate() per condition and question, with a hook that overwrites the decoder's inputs in
    the prefill."""
    answers: Answers = {}
    for name, tokens in {"none": np.arange(0), **plan.sets}.items():
        answers[name] = []
        for question, limit in plan.questions:
            batch = encode(case, question)
            index = torch.from_numpy(tokens).to(case.vlm.device)
            replace = _overwriting(batch.vision_positions(0)[index], plan.replacement)
            decoder = case.vlm.parts.decoder
            hook = decoder.register_forward_pre_hook(replace, with_kwargs=True)
            try:
                answers[name].append(_answer_ids(case, batch, limit))
            finally:
                hook.remove()
    return answers


def _overwriting(positions: Tensor, replacement: Tensor) -> Hook:
    def replace(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult:
        embeds = kwargs["inputs_embeds"]
        if embeds.shape[1] > 1:
            embeds = embeds.clone()
            embeds[:, positions] = replacement.to(embeds)
            kwargs["inputs_embeds"] = embeds
        return args, kwargs

    return replace


KNOCKOUTS = {
    "floor": knockouts_floor,
    "ours": knockouts_ours,
    "published": knockouts_published,
    "vectorised": knockouts_vectorised,
}
ABLATIONS = {"floor": ablation_floor, "ours": ablation_ours, "published": ablation_published}


def agreed_share() -> float | None:
    """The share of the tokens decoded with a draft since the last call that were the draft's."""
    counts = drafts.counted()
    return counts["draft_agreed"] / counts["draft_tokens"] if counts else None


def check_knockouts(case: Case, plan: Plan) -> str:
    """How far the variants agree; AssertionError unless they do."""
    ours = KNOCKOUTS["ours"](case, plan)
    worst = 0.0
    for name in ("published", "vectorised"):
        other = KNOCKOUTS[name](case, plan)
        for key in plan.blocks:
            gap = ((ours[key] - other[key]).abs().max() / other[key].abs().max()).item()
            if not gap <= TOLERANCE:  # a NaN is not <= either
                raise AssertionError(
                    f"knockouts differ by {gap:.1e} of the logits' range, more than {TOLERANCE:g}"
                )
            worst = max(worst, gap)
    return f"logits within {worst:.1e} of their range"


def check_ablations(case: Case, plan: Plan) -> str:
    """The same of the ablated answers."""
    ablated = ABLATIONS["ours"](case, plan)
    for name, published in ABLATIONS["published"](case, plan).items():
        if ablated[name] != published:
            raise AssertionError(f"ablated answers differ: {name}: {ablated[name]}, {published}")
    return f"all {len(ablated)} pairs of answers"
