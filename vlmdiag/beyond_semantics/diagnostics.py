"""One prefill and one cached generation per batch, measured by all probes of Beyond Semantics.

Beyond Semantics (arXiv 2503.17349); formulas: docs/studies/beyond_semantics.md, sections 2.3 to
2.6. Used by diagnostic_tools/run_coco_diagnostics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlmdiag.beyond_semantics.artifacts import draw_artifacts
from vlmdiag.beyond_semantics.balance import (
    chance_vision_share,
    counted_steps,
    group_norms,
    head_vision_share,
    layer_shares,
    mean_mass,
    part_shares,
    step_mean,
    step_shares,
    user_text,
)
from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import Generation, answer_ids, extended, generate
from vlmdiag.model.limits import steps_that_fit
from vlmdiag.model.probes import ChatMass, GroupMass, HiddenNorms, RopeShift
from vlmdiag.model.vision import entries
from vlmdiag.pictures.chats import record_of
from vlmdiag.types import Record

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool
    from numpy.typing import NDArray
    from torch import Tensor

    from vlmdiag.batch import Batch
    from vlmdiag.pictures.samples import Pictures, Sample
    from vlmdiag.types import VLM

Arrays = dict[str, "NDArray[np.float32]"]
# name in the record's hidden_norms -> token group
NORM_GROUPS = {"sys": "system", "user_text": "user", "vision": "vision"}
# arrays with an entry for each picture or turn -> the list of the record that says which
OF_PARTS = {
    "picture_mass": "pictures",
    "vision_by_picture": "pictures",
    "turn_mass": "turns",
    "text_by_turn": "turns",
}


@dataclass(frozen=True)
class Measures:
    """What a run measures and how, by the flags of run_coco_diagnostics.py."""

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    seed: int = 0  # of the sampling noise
    vision_scale: float = 1.0  # vision embeddings are multiplied by it
    delta_steps: Sequence[float] = (1.0,)  # shifts of the RoPE probe, in positions
    restrict_to_past: bool = False  # the RoPE probe leaves out the query's own key
    pos_only: bool = False  # only the RoPE probe
    no_rope: bool = False  # all but the RoPE probe
    probe_hidden_norms: bool = False
    hidden_norm_kind: str = "l2"  # or "rms" = l2 / sqrt(d)
    save_hidden_grid: bool = False
    save_hidden_plots: bool = False
    paper_compat: bool = False  # the published definitions where they differ


def check_model(vlm: VLM, measures: Measures) -> None:
    """UsageError where a model lacks what is measured, before anything is written."""
    rope = not measures.no_rope
    try:
        vlm.need("decoder-only", *(["rotary"] if rope else []))
        text_config = vlm.model.config.get_text_config()
        if rope and getattr(text_config, "attn_logit_softcapping", None):
            raise UsageError(
                f"{vlm.path}: the closed form of the RoPE probe does not hold for the softcapped"
                f" scores of {vlm.family.name}"
            )
    except UsageError as error:
        if rope and "decoder-only" in vlm.family.has:
            raise UsageError(f"{error}; --no_rope leaves the RoPE probe out") from error
        raise


def make_process(
    vlm: VLM,
    measures: Measures,
    strip_system: bool = False,
    artifacts: Path | None = None,
    as_drafts: bool = False,
) -> Callable[[Sequence[tuple[Sample, Pictures]]], list[tuple[Record, Arrays]]]:
    """process([(sample, picture), ...]) -> [(record, arrays), ...]: one transfer from the device
    per batch.

    strip_system: leave the system prompt out. artifacts: folder of --save_hidden_plots, a run's
    per_image. Where all samples have a given answer it is measured by teacher forcing in place of a
    generated one; as_drafts: it is likely, see generate().
    """

    def given_to(batch: Batch) -> list[list[int]] | None:
        given = [
            answer_ids(vlm, prompt, sample.given)
            for prompt, sample in zip(batch.prompts, batch.samples, strict=True)
            if sample.given is not None
        ]
        return given if len(given) == len(batch.samples) else None

    @torch.inference_mode()
    def process(loaded: Sequence[tuple[Sample, Pictures]]) -> list[tuple[Record, Arrays]]:
        samples, images = zip(*loaded, strict=True)
        batch = vlm.encode(samples, images, strip_system=strip_system)
        given = given_to(batch)
        forced, drafts = (None, given) if as_drafts else (given, None)
        generation, on_device, shares, norms = _measure(vlm, batch, measures, forced, drafts)
        grid = None
        if norms is not None and (measures.save_hidden_grid or measures.save_hidden_plots):
            grid = norms.norms.cpu().numpy()  # (B, L + 1, T)
        arrays = {name: values.float().cpu().numpy() for name, values in on_device.items()}
        results = []
        for row in range(len(samples)):
            row_grid = None  # (L + 1, T) of this image, without padding
            if grid is not None:
                row_grid = grid[row][:, grid.shape[-1] - batch.lengths[row] :]
            record, row_arrays = _result(
                vlm, batch, row, measures, generation, arrays, shares, row_grid
            )
            if artifacts is not None and row_grid is not None and measures.save_hidden_plots:
                folder = artifacts / f"{samples[row].id}_artifacts"
                draw_artifacts(folder, row_arrays, row_grid, record)
            results.append((record, row_arrays))
        return results

    return process


def _measure(
    vlm: VLM,
    batch: Batch,
    measures: Measures,
    forced: list[list[int]] | None,
    drafts: list[list[int]] | None,
) -> tuple[Generation, dict[str, Tensor], dict[str, list[list[float]]], HiddenNorms | None]:
    """Generation, {array: (B, ...)} on the device, {share: [[one per step], ...]} and the norms."""
    features = vlm.vision(batch)
    for tokens in entries(vlm, features):
        tokens[:] = [of_sample * measures.vision_scale for of_sample in tokens]
    if forced is None:
        steps = steps_that_fit(vlm, batch, measures.max_new_tokens)
    else:
        steps = max(map(len, forced))
    if measures.pos_only:
        steps = 1

    def rope_probe(prompt: Batch) -> RopeShift:
        return RopeShift(prompt, vlm.rotary, measures.delta_steps, measures.restrict_to_past)

    rope = None if measures.no_rope else rope_probe(batch)
    balance = None if measures.pos_only else GroupMass(batch, steps)
    parts = None
    if balance is not None and batch.numbers is not None:
        parts = ChatMass(batch, steps)
    norms = None
    if measures.probe_hidden_norms and not measures.pos_only:
        # Hugging Face normalises the last hidden state, so the published code does
        final = vlm.parts.norm if measures.paper_compat else None
        norms = HiddenNorms(measures.hidden_norm_kind, final)
    # the published RoPE probe looks from an EOS token after the prompt, in a pass of its own
    probes = [None if measures.paper_compat else rope, norms, balance, parts]
    with capture(vlm, [probe for probe in probes if probe is not None]):
        generation = generate(
            vlm,
            batch,
            steps,
            measures.do_sample,
            measures.temperature,
            seed=measures.seed,
            answers=forced,
            features=features,
            drafts=drafts,
        )
    if measures.paper_compat and rope is not None:
        longer = extended(batch, [vlm.end_id])
        rope = rope_probe(longer)
        with capture(vlm, [rope]):
            generate(vlm, longer, 1, features=features)

    arrays: dict[str, Tensor] = {}
    if rope is not None:
        for name in ("alphaV", "share_prod_notV", "delta_gv_derivative"):
            arrays[name] = rope[name].movedim(1, 0)  # (B, L, H)
        for name in ("delta_gv", "delta_alphaV"):
            per_delta = rope[name].movedim(2, 0)  # (B, deltas, L, H)
            arrays[name] = per_delta[:, 0]
            arrays[f"{name}_all"] = per_delta
    shares: dict[str, list[list[float]]] = {}
    if balance is not None:
        mass = torch.stack(balance.mass)  # (N, L, B, H, G)
        counted = counted_steps(generation.steps, len(mass))
        arrays["head_vision_share"] = head_vision_share(
            mass, counted, measures.paper_compat
        ).movedim(1, 0)
        arrays["group_mass"] = mean_mass(mass, counted).permute(1, 3, 0, 2)  # (B, G, L, H)
        arrays["layer_shares"] = layer_shares(mass, counted).movedim(2, 0)
        for name, values in step_shares(mass, measures.paper_compat).items():
            shares[name] = values.T.tolist()
        if parts is not None:
            arrays |= _by_part(mass, parts, counted, measures.paper_compat)
    if norms is not None:
        for name, values in group_norms(norms.norms, batch.groups).items():
            arrays[f"hidden_norms_{name}"] = values
    return generation, arrays, shares, norms


def _by_part(
    mass: Tensor, probe: ChatMass, counted: Bool[Tensor, "N B"], paper_compat: bool
) -> dict[str, Tensor]:
    """{array: (B, ...)} of chats: mass of each picture and of each group in each turn, means over
    steps; the shares of pictures and of the turns' user text in each step."""
    pictures, turns = probe.split()
    return {
        "picture_mass": step_mean(pictures, counted).permute(1, 3, 0, 2),  # (B, K, L, H)
        "turn_mass": step_mean(turns, counted).permute(1, 3, 4, 0, 2),  # (B, S, G, L, H)
        # (B, K or S, N)
        "vision_by_picture": part_shares(mass, pictures, paper_compat).permute(1, 2, 0),
        "text_by_turn": part_shares(mass, user_text(turns), paper_compat).permute(1, 2, 0),
    }


def _result(
    vlm: VLM,
    batch: Batch,
    row: int,
    measures: Measures,
    generation: Generation,
    arrays: Arrays,
    shares: dict[str, list[list[float]]],
    grid: NDArray[np.float32] | None,
) -> tuple[Record, Arrays]:
    """Record and arrays of one image. grid (L + 1, T): the norm of each of its prompt positions."""
    sample = batch.samples[row]
    spans = batch.spans(row)
    counts = {
        group: sum(end - start for start, end in of_group) for group, of_group in spans.items()
    }
    record: Record = {
        "image_id": sample.extra["image_id"],
        "file_name": sample.image.name,
        "caption": "",
        "prompt": batch.prompts[row],
        "spans": spans,
        "chance_vision_share": chance_vision_share(counts),
        "groups": list(GROUPS),
    }
    if vlm.parts.without_attention:
        record["layers_without_attention"] = vlm.parts.without_attention
    parts = batch.parts(row)
    record |= record_of(sample) | parts
    row_arrays = {name: values[row] for name, values in arrays.items()}
    if measures.pos_only:
        return record | {"pos_only": True}, row_arrays
    ids = generation.ids[row]
    for name, of_what in OF_PARTS.items():
        if name in row_arrays:
            row_arrays[name] = row_arrays[name][: len(parts.get(of_what, ()))]
    record |= {
        "caption": vlm.text(ids),
        "generated_ids": ids,
        "tokens": vlm.tokenizer.convert_ids_to_tokens(ids),
        "n_steps": len(ids),
        "shares": {name: values[row][: len(ids)] for name, values in shares.items()},
    }
    for name, values in record["shares"].items():
        record[f"mean_{name}_share"] = sum(values) / len(ids)
    for name in ("vision_by_picture", "text_by_turn"):
        if name in row_arrays:
            by_step = row_arrays.pop(name)[:, : len(ids)]
            record.setdefault("shares_by_part", {})[name] = by_step.tolist()
            record[f"mean_{name}"] = by_step.mean(1).tolist()
    if measures.probe_hidden_norms:
        artifacts = f"{sample.id}_artifacts" if measures.save_hidden_plots else None
        record["hidden_norms"] = {
            "kind": measures.hidden_norm_kind,
            "saved_grid": measures.save_hidden_grid,
            "artifacts_dir": artifacts,
        }
        for name in ("sys", "user_text", "vision"):
            record["hidden_norms"][f"has_{name}"] = bool(counts.get(NORM_GROUPS[name]))
        if measures.save_hidden_grid and grid is not None:
            row_arrays["hidden_norms_grid"] = grid
    return record, row_arrays
