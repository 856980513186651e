"""The variants of bench_peers.py, and that their outputs are equal.

variant(model) -> {job: work()}, each in a process of its own, because TransformerLens rebuilds the
model that it is given.

Every tool runs the same forward pass and is used as its documentation shows; what it hands over is
reduced by the same three functions, whose results are compared. Shapes: B prompts, L layers, H
heads, T prompt length, d width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from benchmarks.cases import model_inputs
from common import capture
from vlmdiag.groups import GROUPS, VISION
from vlmdiag.model.lens import Lens
from vlmdiag.model.probes import GroupMass, HiddenNorms, LastStates

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from common import VLM
    from vlmdiag.batch import Batch

ATTENTION = "attention shares"
NORMS = "residual norms"
LENS = "logit lens"
JOBS = (ATTENTION, NORMS, LENS)
TEXT = [GROUPS.index("user"), GROUPS.index("template")]  # the papers' user text
TOP = 5  # tokens of the lens
TOLERANCE = 1e-4

Work = Callable[[], "dict[str, Tensor]"]
Jobs = dict[str, Work]


class Model:
    """A LLaVA, one batch of prompts, and what is measured of them."""

    def __init__(self, vlm: VLM, batch: Batch) -> None:
        self.vlm = vlm
        self.batch = batch
        self.inputs = model_inputs(vlm, batch) | {"use_cache": False, "logits_to_keep": 1}
        groups = batch.groups
        columns = [groups == VISION, torch.isin(groups, torch.tensor(TEXT, device=groups.device))]
        self.columns = torch.stack(columns, -1).float()  # (B, T, 2)
        # as the model was built: TransformerLens puts its own modules in their places
        self.layers = vlm.parts.layers
        self.norm = vlm.parts.norm
        self.head = vlm.parts.lm_head

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Within it the only attention of transformers that hands its maps over; else SDPA."""
        decoder = self.vlm.parts.decoder
        decoder.set_attn_implementation("eager")
        try:
            yield
        finally:
            decoder.set_attn_implementation("sdpa")

    def forward(self, **options: Any) -> Any:
        """The plain pass over the prompts, tower included."""
        return self.vlm.model(**self.inputs, **options)

    def shares(self, attention: Float[Tensor, "B H Q T"]) -> Float[Tensor, "B H 2"]:
        """How much the last query row sees of picture and text."""
        return attention[:, :, -1] @ self.columns

    def norms(self, states: Float[Tensor, "B T d"]) -> Float[Tensor, "B T"]:
        """L2 norms at every position."""
        return states.norm(dim=-1)

    def lens(self, states: Float[Tensor, "B d"], normed: bool = False) -> tuple[Tensor, Tensor]:
        """(ids, probabilities) of the likeliest tokens, (B, TOP) each. normed: the final norm was
        applied already."""
        best = self.head(states if normed else self.norm(states)).softmax(-1).topk(TOP)
        return best.indices, best.values


def of_shares(shares: list[Tensor]) -> dict[str, Tensor]:
    return {"shares": torch.stack(shares)}


def of_norms(norms: list[Tensor]) -> dict[str, Tensor]:
    return {"norms": torch.stack(norms)}


def of_lens(best: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    ids, probabilities = zip(*best, strict=True)
    return {"ids": torch.stack(ids), "probabilities": torch.stack(probabilities)}


# --- variants -------------------------------------------------------------------------------------


def floor(model: Model) -> Jobs:
    """The plain pass with SDPA; nothing is measured."""

    def work() -> dict[str, Tensor]:
        model.forward()
        return {}

    return dict.fromkeys(JOBS, work)


def ours(model: Model) -> Jobs:
    """Probes of capture()."""
    lens = Lens(model.vlm)
    lens.top_k(model.vlm.parts.norm.weight[None], TOP)  # once a model: what comes behind its head

    def attention() -> dict[str, Tensor]:
        with capture(model.vlm, [probe := GroupMass(model.batch)]):
            model.forward()
        mass = probe.mass[0]
        return {"shares": torch.stack([mass[..., VISION], mass[..., TEXT].sum(-1)], -1)}

    def norms() -> dict[str, Tensor]:
        with capture(model.vlm, [probe := HiddenNorms()]):
            model.forward()
        return {"norms": probe.norms[:, :-1].transpose(0, 1)}

    def logit_lens() -> dict[str, Tensor]:
        with capture(model.vlm, [probe := LastStates(range(len(model.layers)))]):
            model.forward()
        ids, probabilities = lens.top_k(probe.states, TOP)
        return {"ids": ids.transpose(0, 1), "probabilities": probabilities.transpose(0, 1)}

    return {ATTENTION: attention, NORMS: norms, LENS: logit_lens}


def transformers(model: Model) -> Jobs:
    """output_attentions on eager attention, output_hidden_states on SDPA."""

    def attention() -> dict[str, Tensor]:
        with model.eager():
            maps = model.forward(output_attentions=True).attentions
        return of_shares([model.shares(of_layer) for of_layer in maps])

    def norms() -> dict[str, Tensor]:
        states = model.forward(output_hidden_states=True).hidden_states
        return of_norms([model.norms(entering) for entering in states[:-1]])

    def logit_lens() -> dict[str, Tensor]:
        states = model.forward(output_hidden_states=True).hidden_states
        best = [model.lens(after[:, -1]) for after in states[1:-1]]
        # transformers has put the last one through the final norm
        return of_lens([*best, model.lens(states[-1][:, -1], normed=True)])

    return {ATTENTION: attention, NORMS: norms, LENS: logit_lens}


def nnsight_save(model: Model) -> Jobs:
    """What a job needs is saved of every layer and reduced after the pass."""
    from nnsight import NNsight

    traced = NNsight(model.vlm.model)
    layers = traced.model.language_model.layers

    def attention() -> dict[str, Tensor]:
        with model.eager(), traced.trace(**model.inputs):
            maps = list().save()
            for layer in layers:
                maps.append(layer.self_attn.output[1])
        return of_shares([model.shares(of_layer) for of_layer in maps])

    def norms() -> dict[str, Tensor]:
        with traced.trace(**model.inputs):
            states = list().save()
            for layer in layers:
                states.append(layer.input)
        return of_norms([model.norms(entering) for entering in states])

    def logit_lens() -> dict[str, Tensor]:
        with traced.trace(**model.inputs):
            states = list().save()
            for layer in layers:
                states.append(layer.output[:, -1])
        return of_lens([model.lens(after) for after in states])

    return {ATTENTION: attention, NORMS: norms, LENS: logit_lens}


def nnsight_reduce(model: Model) -> Jobs:
    """Reduced inside the trace; a layer's maps or states are not kept."""
    from nnsight import NNsight

    traced = NNsight(model.vlm.model)
    layers = traced.model.language_model.layers

    def attention() -> dict[str, Tensor]:
        with model.eager(), traced.trace(**model.inputs):
            shares = list().save()
            for layer in layers:
                shares.append(model.shares(layer.self_attn.output[1]))
        return of_shares(shares)

    def norms() -> dict[str, Tensor]:
        with traced.trace(**model.inputs):
            reduced = list().save()
            for layer in layers:
                reduced.append(model.norms(layer.input))
        return of_norms(reduced)

    def logit_lens() -> dict[str, Tensor]:
        with traced.trace(**model.inputs):
            best = list().save()
            for layer in layers:
                best.append(model.lens(layer.output[:, -1]))
        return of_lens(best)

    return {ATTENTION: attention, NORMS: norms, LENS: logit_lens}


def _bridge(model: Model) -> Any:
    """TransformerLens around the model, which it sets to eager attention for all jobs."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.transformers import helpers

    model.vlm.model.config.architectures = [type(model.vlm.model).__name__]
    # it would install torchvision, and with it another torch, for a processor that is not used
    with mock.patch.object(helpers, "_ensure_torchvision", return_value=False):
        return TransformerBridge.boot_transformers(
            model.vlm.path,
            hf_model=model.vlm.model,
            tokenizer=model.vlm.tokenizer,
            device=str(model.vlm.device),
        )


def _names(model: Model, point: str) -> list[str]:
    return [f"blocks.{layer}.{point}" for layer in range(len(model.layers))]


def transformer_lens_cache(model: Model) -> Jobs:
    """run_with_cache() of what a job needs, reduced after the pass."""
    bridge = _bridge(model)
    inputs = dict(model.inputs)
    ids = inputs.pop("input_ids")

    def cached(point: str, **options: Any) -> list[Tensor]:
        names = _names(model, point)
        _, cache = bridge.run_with_cache(ids, names_filter=names, **options, **inputs)
        return [cache[name] for name in names]

    def attention() -> dict[str, Tensor]:
        maps = cached("attn.hook_pattern", pos_slice=-1)
        return of_shares([model.shares(of_layer) for of_layer in maps])

    def norms() -> dict[str, Tensor]:
        states = cached("hook_resid_pre")
        return of_norms([model.norms(entering) for entering in states])

    def logit_lens() -> dict[str, Tensor]:
        states = cached("hook_resid_post", pos_slice=-1)
        return of_lens([model.lens(after[:, 0]) for after in states])

    return {ATTENTION: attention, NORMS: norms, LENS: logit_lens}


def transformer_lens_hooks(model: Model) -> Jobs:
    """run_with_hooks() that reduce at once."""
    bridge = _bridge(model)
    inputs = dict(model.inputs)
    ids = inputs.pop("input_ids")

    def hooked(point: str, reduce: Callable[[Tensor], Any]) -> list[Any]:
        reduced: list[Any] = []

        def hook(given: Tensor, hook: object) -> None:
            reduced.append(reduce(given))

        hooks = [(name, hook) for name in _names(model, point)]
        bridge.run_with_hooks(ids, fwd_hooks=hooks, **inputs)
        return reduced

    def attention() -> dict[str, Tensor]:
        return of_shares(hooked("attn.hook_pattern", model.shares))

    def norms() -> dict[str, Tensor]:
        return of_norms(hooked("hook_resid_pre", model.norms))

    def logit_lens() -> dict[str, Tensor]:
        return of_lens(hooked("hook_resid_post", lambda after: model.lens(after[:, -1])))

    return {ATTENTION: attention, NORMS: norms, LENS: logit_lens}


VARIANTS: dict[str, Callable[[Model], Jobs]] = {
    "floor": floor,
    "ours": ours,
    "transformers": transformers,
    "nnsight, save": nnsight_save,
    "nnsight, reduce": nnsight_reduce,
    "TransformerLens, cache": transformer_lens_cache,
    "TransformerLens, hooks": transformer_lens_hooks,
}


# --- equal outputs --------------------------------------------------------------------------------


def check(outputs: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]) -> float:
    """The largest difference from ours, relative where numbers exceed 1. outputs: {variant: {job:
    {quantity: array}}}. AssertionError unless all variants agree within TOLERANCE."""
    worst = 0.0
    for variant, of_jobs in outputs.items():
        for job in JOBS if variant != "floor" else ():
            for quantity, ours in outputs["ours"][job].items():
                other = of_jobs[job][quantity]
                gap = float("nan")
                if other.shape == ours.shape:
                    gap = float((np.abs(other - ours) / np.maximum(1, np.abs(ours))).max())
                if not gap <= TOLERANCE:  # a NaN is not <= either
                    raise AssertionError(
                        f"{quantity} of {variant} {other.shape} differ from ours {ours.shape} by"
                        f" {gap:.2g}, more than {TOLERANCE:g}"
                    )
                worst = max(worst, gap)
    return worst
