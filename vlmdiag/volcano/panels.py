"""Maps of the attention to the picture, of whole texts and of chosen spans, and their coverage in
numbers.

    map of a text [p] = mean over its tokens of c[t, p], stop token not counted
    map of a span [p] = mean over its tokens

Volcano (arXiv 2311.07362), figure 4 below; docs/studies/volcano.md, sections 1.3 and 2.3 to 2.8.
Used by visualize/image_attention_heatmap.py; drawn by image_figure.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vlmdiag.cli import UsageError
from vlmdiag.figures.plots import visible
from vlmdiag.pictures.spread import normalized_entropy
from vlmdiag.types import Record
from vlmdiag.volcano.maps import coverage, top_l_mean
from vlmdiag.volcano.tensors import find_span, numbers, token_maps

if TYPE_CHECKING:
    from jaxtyping import Float

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.volcano.tensors import Instance

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"


class MapSettings(Protocol):
    """The flags of image_attention_heatmap.py that the maps depend on."""

    hidden_top_k: int
    feedback_target_tokens: list[str]
    occurrence: list[int]  # of each target, from 1
    stage: str  # text that the targets are looked up in
    quantile: float
    no_overlay: bool
    paper_compat: bool


@dataclass(frozen=True)
class Panel:
    """One map. title, statistic and text are for people."""

    title: str
    stage: str
    statistic: str
    target: str  # "" for a whole text
    occurrence: int  # 0 for a whole text
    tokens: list[int]  # that it is the mean over
    text: str  # what they say
    values: Float[np.ndarray, " P"]


# ---- the grid of an encoder's name ----


def side_of(encoder: str) -> int:
    """Patches per side that an encoder's name says: resolution // patch, resolution 224 where it
    names none."""
    sizes = re.findall(r"patch[-_]?(\d+)(?:[-_](\d+))?", encoder)
    if not sizes or not int(sizes[-1][0]):
        raise UsageError(
            f"--vision-encoder-name {encoder}: no patch size in the name, such as in"
            " openai/clip-vit-large-patch14-336; leave the flag out"
        )
    patch, resolution = sizes[-1]
    return int(resolution or 224) // int(patch)


def check_encoder(instance: Instance, encoder: str) -> None:
    """UsageError where the stored grid is not that of the encoder's name."""
    side = side_of(encoder)
    shape = instance.grid.shape
    if shape == (side, side):
        return
    stored = f"{shape[0]} x {shape[1]} patches" if shape else "no single regular grid"
    sizes = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in instance.vision_encoder.items()
        if value
    ]
    if sizes:
        stored += f" ({', '.join(sizes)})"
    raise UsageError(
        f"--vision-encoder-name {encoder} means {side} x {side} patches, but"
        f" {instance.folder.name} has {stored}; leave the flag out"
    )


# ---- maps ----


def panels_of(instance: Instance, args: MapSettings) -> list[Panel]:
    """The maps of the texts, then of the spans. UsageError where there is none."""
    maps = {name: token_maps(instance, name, args.hidden_top_k) for name in instance.stages}
    panels = [*_panels_of_texts(instance, maps, args), *_panels_of_spans(instance, maps, args)]
    if not panels:
        raise UsageError(f"{instance.folder}: no text has a token that counts, so there is no map")
    return panels


def _panels_of_texts(
    instance: Instance, maps: dict[str, Float[np.ndarray, "T P"]], args: MapSettings
) -> Iterator[Panel]:
    """Means over the steps; paper_compat: of initial response and feedback, the mean of the l
    largest steps, l = steps of the shorter one."""
    texts = [
        name
        for name, stage in instance.stages.items()
        if stage.steps and not (args.paper_compat and name == "revision")
    ]
    if args.paper_compat and {"initial", "feedback"} - set(texts):
        raise UsageError(
            "--paper_compat compares initial response and feedback;"
            f" {instance.missing() or 'one of them has no token'}"
        )
    shortest = min((instance.stages[name].steps for name in texts), default=0)
    for name in texts:
        stage = instance.stages[name]
        steps = stage.steps
        largest = steps
        statistic = "mean over 1 step" if steps == 1 else f"mean over {steps} steps"
        if args.paper_compat:
            largest = shortest
            statistic = f"mean of the {largest} largest of {steps} steps"
        yield Panel(
            title=f"{name.capitalize()} (all tokens)",
            stage=name,
            statistic=statistic,
            target="",
            occurrence=0,
            tokens=list(range(steps)),
            text=stage.text.strip(),
            values=top_l_mean(maps[name][:steps], largest),
        )


def _panels_of_spans(
    instance: Instance, maps: dict[str, Float[np.ndarray, "T P"]], args: MapSettings
) -> Iterator[Panel]:
    """Means over the tokens of each target."""
    if args.feedback_target_tokens and args.stage not in instance.stages:
        raise UsageError(
            f"{instance.missing()}; --stage initial takes the spans from the initial response"
        )
    for target, occurrence in zip(args.feedback_target_tokens, args.occurrence):
        stage = instance.stages[args.stage]
        tokens = find_span(stage.tokens, stage.spans, stage.text, target, occurrence)
        pieces = stage.pieces()
        text = "".join(pieces[i] for i in tokens).strip()
        quoted = text if len(text) <= 40 else text[:39].rstrip() + ELLIPSIS
        noun = "token" if len(tokens) == 1 else "tokens"
        yield Panel(
            title=(
                f"{args.stage.capitalize()}"
                f" \N{LEFT DOUBLE QUOTATION MARK}{quoted}\N{RIGHT DOUBLE QUOTATION MARK}"
            ),
            stage=args.stage,
            statistic=f"mean over {noun} {numbers(tokens)}",
            target=target,
            occurrence=occurrence,
            tokens=tokens,
            text=text,
            values=maps[args.stage][tokens].mean(0),
        )


# ---- numbers ----


def scale_of(panels: Sequence[Panel], grid: PatchGrid, quantile: float) -> tuple[float, float]:
    """(vmin, vmax): the smallest value of all panels and their quantile, a value that occurs (the
    nearest rank, as published). Tokens with a box only."""
    values = np.concatenate([panel.values[grid.has_box] for panel in panels])
    return float(values.min()), float(np.quantile(values, quantile, method="nearest"))


def numbers_of(panel: Panel, grid: PatchGrid) -> dict[str, float]:
    """Coverage of a map, over the vision tokens that have a box."""
    values = panel.values[grid.has_box]
    return {
        "mean": float(values.mean()),
        "min": float(values.min()),
        "max": float(values.max()),
        "normalized_entropy": normalized_entropy(values),
        "share_of_patches_with_50_percent": coverage(values, 0.5),
        "share_of_patches_with_90_percent": coverage(values, 0.9),
    }


def table_of(
    panels: Sequence[Panel], scale: tuple[float, float], grid: PatchGrid, args: MapSettings
) -> dict[str, list[object]]:
    """The panels as columns of a CSV."""
    columns: dict[str, list[object]] = {}
    for panel in panels:
        row: Record = {
            "panel": panel.title,
            "stage": panel.stage,
            "statistic": panel.statistic,
            "target": panel.target,
            "occurrence": panel.occurrence or "",
            "text": visible(panel.text),
            "tokens": numbers(panel.tokens),
            "steps": len(panel.tokens),
        }
        row |= numbers_of(panel, grid)
        row |= {
            "vmin": scale[0],
            "vmax": scale[1],
            "quantile": args.quantile,
            "hidden_top_k": args.hidden_top_k,
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def tag_of(args: MapSettings) -> str:
    """The spans as part of a file name: rather,silver,._the,red,c; 'all' without spans; what else
    changes the maps behind two underscores."""
    targets = [
        target if occurrence == 1 else f"{target}~{occurrence}"
        for target, occurrence in zip(args.feedback_target_tokens, args.occurrence)
    ]
    spans = "_".join(targets) or "all"
    tag = re.sub(r"[^\w,.'()+=~-]", "-", spans)
    if len(tag.encode()) > 120:
        digest = hashlib.sha256(spans.encode()).hexdigest()[:8]
        tag = f"{tag.encode()[:100].decode(errors='ignore')}~{digest}"
    parts = [tag]
    if args.feedback_target_tokens and args.stage != "feedback":
        parts.append(args.stage)
    if args.paper_compat:
        parts.append("paper_compat")
    if args.no_overlay:
        parts.append("no_overlay")
    return "__".join(parts)
