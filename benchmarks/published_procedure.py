"""The published procedure of Beyond Semantics (arXiv 2503.17349), as the benchmark's peer: what our
study of it found (sections 2 and 3), in our words.

One picture at a time: generate() with eager attention returns all maps and hidden states; shares
are computed from the returned maps; the RoPE probe is a second complete forward, tower included,
that keeps the queries and keys of all layers. Works on any LLaVA over Llama without grouped
queries.
"""

import json
from unittest import mock

import numpy as np
import torch
from transformers.models.llama import modeling_llama

from vlmdiag.pictures.samples import load_image


@torch.inference_mode()
def diagnose(vlm, sample, new_tokens, folder):
    """Write <id>.npz and <id>.json of one sample into a folder."""
    batch, decoder = vlm.encode([sample], [load_image(sample.image)]), vlm.parts.decoder
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    inputs["pixel_values"] = batch.image_inputs["pixel_values"].to(vlm.device, vlm.dtype)
    spans = batch.spans(0)
    groups = {
        "sys": spans["system"],
        "user_text": spans["user"] + spans["template"],
        "vision": spans["vision"],
    }
    keep = {
        "output_attentions": True,
        "output_hidden_states": True,
        "return_dict_in_generate": True,
    }
    decoder.set_attn_implementation("eager")
    try:
        found = vlm.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **keep)
    finally:
        decoder.set_attn_implementation("sdpa")
    arrays = {"head_vision_share": head_vision_share(found.attentions, groups)} | rope_probe(
        vlm, inputs, slice(*groups["vision"][0])
    )
    norms = (
        torch.stack([states[0].float().norm(dim=-1) for states in found.hidden_states[0]])
        .cpu()
        .numpy()
    )  # (L + 1, T)
    arrays |= {
        f"hidden_norms_{name}": np.concatenate([norms[:, a:b] for a, b in ranges], 1).mean(1)
        for name, ranges in groups.items()
    }
    ids = found.sequences[0, batch.lengths[0] :].tolist()
    record = {
        "image_id": sample.extra["image_id"],
        "file_name": sample.image.name,
        "caption": vlm.tokenizer.decode(ids),
        "generated_ids": ids,
    }
    np.savez_compressed(folder / f"{sample.id}.npz", **arrays)
    (folder / f"{sample.id}.json").write_text(
        json.dumps(record | mean_shares(found.attentions, groups))
    )


def head_vision_share(attentions, groups):
    """(L, H): mean over steps of V / (V + U) in the last row of each step's maps (1, H, Q, K)."""
    steps = []
    for maps in attentions:
        rows = torch.stack([layer[0, :, -1] for layer in maps])
        vision, user = (
            sum(rows[..., a:b].sum(-1) for a, b in groups[name]) for name in ("vision", "user_text")
        )
        steps.append((vision / (vision + user).clamp_min(1e-8)).float())
    return torch.stack(steps).mean(0).cpu().numpy()


def mean_shares(attentions, groups):
    """Shares from one zero-padded matrix of all prompt and answer rows on the CPU: heads averaged,
    BOS left out, layers averaged."""

    def average(maps, rows):
        kept = [layer[0].mean(0)[rows].float().cpu() for layer in maps]
        for row in kept:
            row[:, 0] = 0
        return torch.stack([row / row.sum(-1, keepdim=True).clamp_min(1e-12) for row in kept]).mean(
            0
        )

    length = attentions[0][0].shape[-1]
    matrix = torch.zeros(length + len(attentions), length + len(attentions))
    matrix[1:length, :length] = average(attentions[0], slice(0, -1))
    for step, maps in enumerate(attentions):
        matrix[length + step, : length + step] = average(maps, slice(-1, None))[0]
    shares = []
    for row in matrix[length:]:
        system, user, vision = (
            sum(row[a:b].sum().item() for a, b in ranges) for ranges in groups.values()
        )
        shares.append(
            [
                part / (whole or 1.0)  # a denominator of 0 is replaced by 1
                for part, whole in (
                    (vision, vision + user),
                    (user, vision + user),
                    (system, system + vision + user),
                )
            ]
        )
    return dict(
        zip(("mean_vision_share", "mean_text_share", "mean_sys_share"), np.mean(shares, 0).tolist())
    )


def rope_probe(vlm, inputs, vision, delta=1.0):
    """(L, H) arrays from a forward over the prompt and an EOS token, whose row sees vision keys
    moved by delta; q and k of all layers are kept."""
    kept, rotate, length = [], modeling_llama.apply_rotary_pos_emb, inputs["input_ids"].shape[1]

    def keep(*args, **options):
        kept.append(rotate(*args, **options))
        return kept[-1]

    ids = torch.cat(
        [inputs["input_ids"], inputs["input_ids"].new_full((1, 1), vlm.tokenizer.eos_token_id)], 1
    )
    with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", keep):
        vlm.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            use_cache=False,
        )
    angle, found = delta * vlm.parts.decoder.rotary_emb.inv_freq.float(), []
    for query, keys in kept:
        query, keys = (
            query[0, :, -1, :, None].float(),
            keys[0, :, :length].float(),
        )  # restrict_to_past: without the EOS token's own key
        moved, (a, b) = keys.clone(), keys[:, vision].chunk(2, -1)
        moved[:, vision] = torch.cat(
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1
        )
        before, after = ((some @ query)[..., 0] / query.shape[1] ** 0.5 for some in (keys, moved))
        alpha, change = before.softmax(-1)[:, vision], (after - before)[:, vision] / delta
        mass = alpha.sum(-1)
        found.append(
            torch.stack(
                [
                    mass,
                    mass * (1 - mass),
                    (alpha / mass[:, None] * change).sum(-1),
                    after.softmax(-1)[:, vision].sum(-1) - mass,
                ]
            )
        )
    return dict(
        zip(
            ("alphaV", "share_prod_notV", "delta_gv", "delta_alphaV"),
            torch.stack(found, 1).cpu().numpy(),
        )
    )
