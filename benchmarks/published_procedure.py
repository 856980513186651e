"""The published procedure of Beyond Semantics (arXiv 2503.17349), as the benchmark's peer: written
from docs/studies/beyond_semantics.md, sections 2 and 3.

One picture at a time: generate() with eager attention returns all maps and hidden states; shares
are computed from the returned maps; the RoPE probe is a second complete forward, tower included,
that keeps the queries and keys of all layers. Works on any LLaVA over Llama without grouped
queries.

Shapes: L layers, H heads, Q query rows, K keys, T prompt length, P vision tokens, D head dimension,
d width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from transformers.models.llama import modeling_llama

from benchmarks.cases import encode_samples, model_inputs

if TYPE_CHECKING:
    from jaxtyping import Float, Float32
    from torch import Tensor

    from common import VLM
    from vlmdiag.pictures.samples import Sample

# maps of one step, layer by layer: the prefill's have all query rows, a step's have one
Maps = Sequence["Float[Tensor, '1 H Q K']"]
Groups = dict[str, list[list[int]]]  # ranges [start, end) of positions: sys, user_text, vision
LEAST_MASS = 1e-8  # in place of a denominator of 0
SHARES = ("mean_vision_share", "mean_text_share", "mean_sys_share")
PROBED = ("alphaV", "share_prod_notV", "delta_gv", "delta_alphaV")


@torch.inference_mode()
def diagnose(vlm: VLM, sample: Sample, new_tokens: int, folder: Path) -> None:
    """Write <id>.npz and <id>.json of one sample into a folder."""
    batch = encode_samples(vlm, [sample])
    inputs = model_inputs(vlm, batch)
    spans = batch.spans(0)
    groups = {
        "sys": spans["system"],
        "user_text": spans["user"] + spans["template"],
        "vision": spans["vision"],
    }
    decoder = vlm.parts.decoder
    decoder.set_attn_implementation("eager")
    try:
        output = vlm.model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            output_attentions=True,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    finally:
        decoder.set_attn_implementation("sdpa")
    arrays = {"head_vision_share": head_vision_share(output.attentions, groups)}
    arrays |= rope_probe(vlm, inputs, slice(*groups["vision"][0]))
    arrays |= hidden_norms(output.hidden_states[0], groups)
    ids = output.sequences[0, batch.lengths[0] :].tolist()
    record = {
        "image_id": sample.extra["image_id"],
        "file_name": sample.image.name,
        "caption": vlm.tokenizer.decode(ids),
        "generated_ids": ids,
        **mean_shares(output.attentions, groups),
    }
    np.savez_compressed(folder / f"{sample.id}.npz", **arrays)
    (folder / f"{sample.id}.json").write_text(json.dumps(record))


def hidden_norms(
    states: Sequence[Float[Tensor, "1 T d"]], groups: Groups
) -> dict[str, Float32[np.ndarray, " L+1"]]:
    """{hidden_norms_<group>: mean norm of the prompt's hidden states}."""
    norms = torch.stack([layer[0].float().norm(dim=-1) for layer in states]).cpu().numpy()
    means = {}
    for name, ranges in groups.items():
        of_group = np.concatenate([norms[:, start:end] for start, end in ranges], 1)
        means[f"hidden_norms_{name}"] = of_group.mean(1)
    return means


def head_vision_share(attentions: Sequence[Maps], groups: Groups) -> Float32[np.ndarray, "L H"]:
    """Mean over steps of V / (V + U) in the last row of each step's maps."""
    shares = []
    for maps in attentions:
        rows = torch.stack([layer[0, :, -1] for layer in maps])  # (L, H, K)
        vision, user = (
            sum(rows[..., start:end].sum(-1) for start, end in groups[name])
            for name in ("vision", "user_text")
        )
        shares.append((vision / (vision + user).clamp_min(LEAST_MASS)).float())
    return torch.stack(shares).mean(0).cpu().numpy()


def _mean_rows(maps: Maps, rows: slice) -> Float32[Tensor, "Q K"]:
    """Query rows on the CPU: heads averaged, BOS left out, scaled to sum 1, layers averaged."""
    of_layers = []
    for layer in maps:
        weights = layer[0].mean(0)[rows].float().cpu()
        weights[:, 0] = 0
        of_layers.append(weights / weights.sum(-1, keepdim=True).clamp_min(1e-12))
    return torch.stack(of_layers).mean(0)


def mean_shares(attentions: Sequence[Maps], groups: Groups) -> dict[str, float]:
    """Shares from one zero-padded matrix of all prompt and answer rows on the CPU."""
    length = attentions[0][0].shape[-1]
    size = length + len(attentions)
    matrix = torch.zeros(size, size)
    matrix[1:length, :length] = _mean_rows(attentions[0], slice(0, -1))
    for step, maps in enumerate(attentions):
        matrix[length + step, : length + step] = _mean_rows(maps, slice(-1, None))[0]
    shares = []
    for row in matrix[length:]:
        system, user, vision = (
            sum(row[start:end].sum().item() for start, end in ranges) for ranges in groups.values()
        )
        # a denominator of 0 is replaced by 1
        prompt = vision + user or 1.0
        whole = system + vision + user or 1.0
        shares.append([vision / prompt, user / prompt, system / whole])
    return dict(zip(SHARES, np.mean(shares, 0).tolist(), strict=True))


def rope_probe(
    vlm: VLM, inputs: dict[str, Tensor], vision: slice, delta: float = 1.0
) -> dict[str, Float32[np.ndarray, "L H"]]:
    """PROBED from a forward over the prompt and an EOS token, whose row sees vision keys moved by
    delta; q and k of all layers are kept."""
    rotated: list[tuple[Tensor, Tensor]] = []  # q and k of each layer
    rotate = modeling_llama.apply_rotary_pos_emb

    def keep(*args: object, **options: object) -> tuple[Tensor, Tensor]:
        rotated.append(rotate(*args, **options))
        return rotated[-1]

    prompt_ids = inputs["input_ids"]
    eos = prompt_ids.new_full((1, 1), vlm.tokenizer.eos_token_id)
    ids = torch.cat([prompt_ids, eos], 1)
    with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", keep):
        vlm.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            use_cache=False,
        )
    angle = delta * vlm.parts.decoder.rotary_emb.inv_freq.float()
    length = prompt_ids.shape[1]
    probed = [_probe_layer(*layer, vision, length, angle, delta) for layer in rotated]
    return dict(zip(PROBED, torch.stack(probed, 1).cpu().numpy(), strict=True))


def _probe_layer(
    queries: Float[Tensor, "1 H K D"],
    keys: Float[Tensor, "1 G K D"],
    vision: slice,
    length: int,
    angle: Float32[Tensor, " D/2"],
    delta: float,
) -> Float32[Tensor, "4 H"]:
    """PROBED of one layer, seen from its last row. G: heads of keys, each for H / G of queries."""
    query = queries[0, :, -1, :, None].float()
    key = keys[0, :, :length].float()  # restrict_to_past: without the EOS token's own key
    key = key.repeat_interleave(len(query) // len(key), 0)
    a, b = key[:, vision].chunk(2, -1)
    moved = key.clone()
    moved[:, vision] = torch.cat(
        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1
    )
    scale = query.shape[1] ** 0.5
    before = (key @ query)[..., 0] / scale
    after = (moved @ query)[..., 0] / scale
    alpha = before.softmax(-1)[:, vision]
    change = (after - before)[:, vision] / delta
    alpha_v = alpha.sum(-1)
    delta_gv = (alpha / alpha_v[:, None] * change).sum(-1)
    delta_alpha_v = after.softmax(-1)[:, vision].sum(-1) - alpha_v
    return torch.stack([alpha_v, alpha_v * (1 - alpha_v), delta_gv, delta_alpha_v])
