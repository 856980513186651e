"""Everything the stethoscope shows of one answer, as files: a run directory that viz_relevancy.py
reads, JSON, PNG, and a ZIP of all.

    runs/relevancy/<model>__app-<time>-<random>/per_image/<id>.json + .npz     as relevancy_maps.py
    writes them
        pictures/<id>.png                                                       the picture as it
        was asked about
        analysis/<id>_shown.json, <id>_<panel>.png                          what the page's panels
        show, with their settings

Apart from stethoscope_views.py, because these are figures for paper and that is a page."""

import io
import json
import math
import os
import secrets
import tempfile
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmdiag.figures import plots
from vlmdiag.model.loading import identity_of
from vlmdiag.runs import rundirs
from vlmdiag.stethoscope.views import (
    Canvas,
    ceiling_of,
    cells_of,
    named,
    relevancy_map,
    selected,
    shown,
)

EXPERIMENT = "relevancy"
COLUMNS = 20  # tokens in one figure
_drawing = threading.Lock()  # pyplot keeps its figures in one place


@dataclass(frozen=True)
class Shown:
    """Where the page's controls stand. head, att_head, pat_head: None for the mean over heads."""

    token: int = 0
    vc_layer: int = -1
    vc_mode: str = "max"
    vc_kind: str = "share"
    rel_layer: int = -1
    rel_hide: bool = False
    att_layer: int = -1
    att_head: int | None = None
    pat_source: str = "attention"
    pat_layer: int = -1
    pat_head: int | None = None
    cmp_layer: int = -1
    cmp_token: int = 0
    cmp_other: int = -1


def export(analysis, shown, model_name, out_root):
    """Write a new run directory. Returns (its path, the ZIP of it in a folder for temporary
    files)."""
    vlm, how = analysis.model.vlm, analysis.decoding
    depth = analysis.model.depth
    identity = identity_of(vlm)
    identity |= {
        "prompt": analysis.batch.prompts[0],
        "layers": list(range(depth)),
        "decoding": vars(how),
        "made_by": "demo_meta.py",
    }
    name = f"app-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    run = rundirs.open_run(
        rundirs.run_path(out_root, model_name, EXPERIMENT, name),
        EXPERIMENT,
        identity,
        {"model_path": str(model_name), "device": str(vlm.device)},
    )
    id = "picture"
    (run.path / "pictures").mkdir()
    analysis.picture.save(run.path / "pictures" / f"{id}.png")
    run.write(id, *item(analysis, id))
    run.finish()
    plots.write_file(
        run.path / "analysis" / f"{id}_shown.json", as_json(summary(analysis, shown)), quiet=True
    )
    with _drawing:
        for panel, draw in FIGURES.items():
            fig = draw(analysis, shown)
            if fig is not None:
                save(
                    fig,
                    run.path / "analysis" / f"{id}_{panel}.png",
                    {"panel": panel, "question": analysis.question} | vars(shown),
                )
    archive = Path(tempfile.mkdtemp(prefix="stethoscope-")) / f"{run.path.name}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bundle:
        for folder, _, files in sorted(os.walk(run.path)):
            for file in sorted(files):
                bundle.write(
                    Path(folder) / file,
                    Path(run.path.name) / (Path(folder) / file).relative_to(run.path),
                )
    return run.path, archive


def save(fig, path, settings):
    """Write a figure as PNG with its settings in the file, laid out once: somebody waits for it,
    and viz_relevancy.py makes PDFs."""
    try:
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        buffer = io.BytesIO()
        fig.savefig(
            buffer,
            format="png",
            dpi=110,
            metadata={"Software": None, "settings": json.dumps(settings, sort_keys=True)},
        )
        plots.write_file(path, buffer.getvalue(), quiet=True)
    finally:
        plots.plt.close(fig)


def as_json(value):
    """Bytes of JSON; arrays as lists, what is not finite as null, what no text can hold escaped."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        return (
            plain(value)
            if isinstance(value, list)
            else None
            if isinstance(value, float) and not math.isfinite(value)
            else value
        )

    return json.dumps(plain(value), indent=1).encode()


def item(analysis, id):
    """(record, arrays) as relevancy_maps.py writes an item."""
    found, grid = analysis.relevancy(), analysis.place(analysis.relevancy().picture.shape[-1])
    arrays = {"rows": found.rows} | ({"cells": found.cells} if found.cells is not None else {})
    arrays["raw_attention"] = np.stack(
        [analysis.attention(layer).mean(1) for layer in range(analysis.model.depth)], 1
    )
    arrays["vision_norms"] = analysis.norms()
    record = {
        "image_id": id,
        "file_name": f"{id}.png",
        "question": analysis.question,
        "prompt": analysis.batch.prompts[0],
        "caption": analysis.text.strip(),
    }
    record |= {
        "generated_ids": analysis.ids,
        "tokens": analysis.tokens,
        "labels": analysis.labels,
        "groups": analysis.groups.tolist(),
    }
    record |= {
        "producing": analysis.producing.tolist(),
        "layers": found.layers,
        "probabilities": analysis.probabilities.tolist(),
    }
    record |= {
        "visual_share": analysis.contribution("max", "share").tolist(),
        "grid": grid and {"shape": grid.shape, "size": grid.size},
    }
    arrays = {name: np.asarray(values, np.float32) for name, values in arrays.items()}
    return record, arrays | ({"boxes": grid.boxes} if grid is not None else {})


def summary(analysis, shown):
    """What the panels show, as JSON: lists over tokens, inside over layers."""
    lens = analysis.evolution()

    def top(ids, probs):
        return [[lens.words[int(i)], float(p)] for i, p in zip(ids, probs, strict=True)]

    found = {
        "question": analysis.question,
        "answer": analysis.text,
        "tokens": analysis.tokens,
        "generated_ids": analysis.ids,
        "settings": vars(shown),
    }
    found |= {
        "probabilities": analysis.probabilities,
        "alternatives": [top(*pair) for pair in zip(lens.ids[:, -1], lens.probs[:, -1])],
    }
    found["evolution"] = {
        "layers": ["embeddings", *range(analysis.model.depth)],
        "top": [[top(*pair) for pair in zip(*rows)] for rows in zip(lens.ids, lens.probs)],
        "probability": lens.chosen,
        "rank": lens.rank,
    }
    found["visual_contribution"] = {
        f"{how} {kind}": analysis.contribution(how, kind)
        for how in ("max", "sum", "mean")
        for kind in ("share", "ratio")
    }
    chosen = selected(analysis, shown.pat_source)
    found["patches"] = {
        "selected": chosen,
        "looked_at": looked_at(analysis, shown, chosen) if chosen else None,
    }
    return found | {"missing": analysis.missing()}


def looked_at(analysis, shown, chosen):
    return analysis.looked_at(
        chosen, shown.pat_source, shown.pat_layer % analysis.model.depth, shown.pat_head
    )


# ---- figures ----


def window(analysis, token):
    """At most COLUMNS tokens around the chosen one, and their labels."""
    start = max(0, min(token - COLUMNS // 2, len(analysis.tokens) - COLUMNS))
    which = range(start, min(start + COLUMNS, len(analysis.tokens)))
    return list(which), [f"{i}:{label(analysis.tokens[i])}" for i in which]


def label(text):
    return shown(text).replace("$", r"\$")


def _token_axis(ax, labels):
    ax.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)


def draw_probabilities(analysis, shown):
    which, labels = window(analysis, shown.token)
    lens = analysis.evolution()
    fig, (left, right) = plots.plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 1.4))
    left.bar(range(len(which)), analysis.probabilities[which], color=plots.GREEN)
    _token_axis(left, labels)
    left.set(title="probability of the token that was produced", ylabel="probability", ylim=(0, 1))
    others = [label(lens.words[int(i)]) for i in lens.ids[shown.token, -1]]
    right.barh(range(len(others)), lens.probs[shown.token, -1], color=plots.SKY)
    right.set_yticks(range(len(others)), others, fontsize=8)
    right.set(
        title=f"alternatives to {label(named(analysis, shown.token))}",
        xlabel="probability",
        xlim=(0, 1),
    )
    right.invert_yaxis()
    return fig


def draw_contribution(analysis, shown):
    which, labels = window(analysis, shown.token)
    values = analysis.contribution(shown.vc_mode, shown.vc_kind)[which].T
    fig, ax = plots.plt.subplots(figsize=(11, 0.22 * len(values) + 2.6))
    how = f"{shown.vc_mode} R_img"
    what = (
        f"{how} / ({how} + {shown.vc_mode} R_text)"
        if shown.vc_kind == "share"
        else f"{how} / {shown.vc_mode} R_text"
    )
    image = plots.heatmap(
        ax,
        values,
        f"visual contribution: {what}, gathered up to each layer",
        0,
        1 if shown.vc_kind == "share" else None,
        "",
        cmap="Reds",
    )
    fig.colorbar(image, ax=ax, label=what).ax.grid(False)
    _token_axis(ax, labels)
    return fig


def draw_evolution(analysis, shown):
    which, labels = window(analysis, shown.token)
    lens = analysis.evolution()
    tops = lens.probs[which, :, 0].T
    fig, ax = plots.plt.subplots(figsize=(12, 0.3 * len(tops) + 2.2))
    image = plots.heatmap(
        ax,
        tops,
        "likeliest token after each layer (final norm and LM head)",
        0,
        1,
        "",
        cmap="Blues",
    )
    for (row, column), value in np.ndenumerate(tops):
        word = label(lens.words[int(lens.ids[which[column], row, 0])])
        ax.text(
            column,
            row,
            word[:9],
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if value > 0.6 else "black",
        )
    ax.set_yticks(range(len(tops)), ["emb", *range(len(tops) - 1)])
    _token_axis(ax, labels)
    fig.colorbar(image, ax=ax, label="probability").ax.grid(False)
    return fig


def _over(ax, analysis, values, ceiling, title):
    """A map over the picture with its colour bar."""
    canvas = Canvas(analysis.picture, analysis.place(len(values)), 480)
    ax.imshow(np.asarray(canvas.overlay(values, ceiling)))
    ax.set(xticks=[], yticks=[])
    ax.set_title(title.replace("$", r"\$"), fontsize=9)
    solid = plots.plt.cm.ScalarMappable(plots.plt.Normalize(0, ceiling), "YlOrRd")
    ax.figure.colorbar(solid, ax=ax, shrink=0.7).ax.grid(False)


def _words(ax, analysis, rows, token, ceiling):
    positions = [
        i
        for i in range(analysis.prompt_length + token)
        if analysis.groups[i] in ("user", "generated")
    ][-40:]
    colors = [plots.ORANGE if analysis.groups[i] == "user" else plots.GREEN for i in positions]
    ax.bar(range(len(positions)), rows[positions], color=colors)
    _token_axis(ax, [label(analysis.labels[i]) for i in positions])
    ax.set_ylim(0, ceiling * 1.05 or 1)
    ax.set_title("relevancy of question (orange) and earlier answer (green)", fontsize=9)


def _two(analysis, pairs, hide=False):
    found = analysis.relevancy()
    maps = [relevancy_map(analysis, token, layer, hide)[0] for token, layer in pairs]
    if analysis.place(len(maps[0])) is None:
        return None
    ceiling = ceiling_of([values[np.isfinite(values)].max() for values in maps], 100)
    words = max(
        float(found.rows[token, layer][analysis.visible_text(token)].max())
        for token, layer in pairs
    )
    fig, axes = plots.plt.subplots(2, len(pairs), figsize=(6 * len(pairs), 7.5), squeeze=False)
    for (token, layer), values, column in zip(pairs, maps, axes.T):
        share = float(analysis.contribution("max", "share")[token, layer])
        _over(
            column[0],
            analysis,
            values,
            ceiling,
            f"relevancy of {named(analysis, token)}, layer {layer}\nvisual contribution"
            f" {share:.2f}",
        )
        _words(column[1], analysis, found.rows[token, layer], token, words)
    return fig


def draw_relevancy(analysis, shown):
    return _two(analysis, [(shown.token, shown.rel_layer % analysis.model.depth)], shown.rel_hide)


def draw_compare(analysis, shown):
    depth = analysis.model.depth
    return _two(
        analysis,
        [(shown.token, shown.cmp_layer % depth), (shown.cmp_token, shown.cmp_other % depth)],
    )


def draw_attention(analysis, shown):
    layer = shown.att_layer % analysis.model.depth
    maps = analysis.attention(layer)[shown.token]
    if analysis.place(maps.shape[-1]) is None:
        return None
    values, name = (
        (maps.mean(0), "mean over heads")
        if shown.att_head is None
        else (maps[shown.att_head], f"head {shown.att_head}")
    )
    fig, (left, right) = plots.plt.subplots(1, 2, figsize=(10, 4.5))
    _over(
        left,
        analysis,
        values,
        ceiling_of(values, 100),
        f"attention of {named(analysis, shown.token)}\nlayer {layer}, {name}",
    )
    right.bar(range(len(maps)), maps.sum(-1), color=plots.BLUE)
    right.set(
        title=f"attention to the picture by head, layer {layer}",
        xlabel="head",
        ylabel="attention",
        ylim=(0, 1),
    )
    plots.layer_ticks(right)
    return fig


def draw_patches(analysis, shown):
    if not (chosen := selected(analysis, shown.pat_source)):
        return None
    canvas, values = (
        Canvas(analysis.picture, analysis.place(cells_of(analysis, shown.pat_source)), 480),
        looked_at(analysis, shown, chosen),
    )
    which, labels = window(analysis, int(np.argmax(values)))
    fig, (left, right) = plots.plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1, 1.5))
    left.imshow(np.asarray(canvas.patches(chosen)))
    left.set(xticks=[], yticks=[], title=f"{len(chosen)} selected patches")
    right.bar(range(len(which)), values[which], color=plots.VERMILION)
    _token_axis(right, labels)
    what = (
        "attention to the patches"
        if shown.pat_source == "attention"
        else "share of the picture's relevancy"
    )
    right.set(title=f"{what}, layer {shown.pat_layer % analysis.model.depth}", ylabel=what)
    return fig


FIGURES = {
    "probabilities": draw_probabilities,
    "contribution": draw_contribution,
    "evolution": draw_evolution,
    "relevancy": draw_relevancy,
    "attention": draw_attention,
    "patches": draw_patches,
    "compare": draw_compare,
}
