"""Everything the stethoscope shows of one answer, as files: a run directory that viz_relevancy.py
reads, JSON, PNG, and a ZIP of all.

    runs/relevancy/<model>__app-<time>-<random>/
        per_image/<id>.json + .npz                    as relevancy_maps.py writes them
        pictures/<id>.png                             the picture as it was asked about
        analysis/<id>_shown.json, <id>_<panel>.png    what the page's panels show, with their
                                                      settings
"""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import threading
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.figures import plots
from vlmdiag.model.identity import identity_of
from vlmdiag.runs import rundirs
from vlmdiag.stethoscope.figures import FIGURES, Shown, looked_at
from vlmdiag.stethoscope.views import selected
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from matplotlib.figure import Figure

    from vlmdiag.stethoscope.analysis import Analysis

__all__ = ["Shown", "export"]

EXPERIMENT = "relevancy"
ID = "picture"
_drawing = threading.Lock()  # pyplot keeps its figures in one place


def export(
    analysis: Analysis, shown: Shown, model_name: str, out_root: str | Path, folder: Path
) -> tuple[Path, Path]:
    """Write a new run directory. Returns (its path, the ZIP of it in the folder)."""
    vlm = analysis.model.vlm
    identity = identity_of(vlm) | {
        "prompt": analysis.batch.prompts[0],
        "layers": list(range(analysis.model.depth)),
        "decoding": vars(analysis.decoding),
        "made_by": "demo_meta.py",
    }
    free = {"model_path": str(model_name), "device": str(vlm.device)}
    name = f"app-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    path = rundirs.run_path(out_root, model_name, EXPERIMENT, name)
    run = rundirs.open_run(path, EXPERIMENT, identity, free)
    (run.path / "pictures").mkdir()
    analysis.picture.save(run.path / "pictures" / f"{ID}.png")
    run.write(ID, *item(analysis))
    run.finish()
    figures = run.path / "analysis"
    plots.write_file(figures / f"{ID}_shown.json", as_json(summary(analysis, shown)), quiet=True)
    with _drawing:
        for panel, draw in FIGURES.items():
            figure = draw(analysis, shown)
            if figure is not None:
                settings = {"panel": panel, "question": analysis.question} | vars(shown)
                save(figure, figures / f"{ID}_{panel}.png", settings)
    return run.path, zipped(run.path, folder)


def zipped(path: Path, where: Path) -> Path:
    """A ZIP of a folder in another one."""
    archive = where / f"{path.name}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bundle:
        for folder, _, names in sorted(os.walk(path)):
            for name in sorted(names):
                file = Path(folder) / name
                bundle.write(file, Path(path.name) / file.relative_to(path))
    return archive


def save(figure: Figure, path: Path, settings: Fields) -> None:
    """Write a figure as PNG with its settings in the file, laid out once: somebody waits for it,
    and viz_relevancy.py makes PDFs."""
    metadata = {"Software": None, "settings": json.dumps(settings, sort_keys=True)}
    try:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata=metadata)
        plots.write_file(path, buffer.getvalue(), quiet=True)
    finally:
        plt.close(figure)


def as_json(value: object) -> bytes:
    """Bytes of JSON; arrays as lists, what is not finite as null, what no text can hold escaped."""
    return json.dumps(_plain(value), indent=1).encode()


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def item(analysis: Analysis) -> tuple[Record, dict[str, np.ndarray]]:
    """(record, arrays) as relevancy_maps.py writes an item."""
    relevancy = analysis.relevancy()
    arrays: dict[str, np.ndarray] = {"rows": relevancy.rows}
    if relevancy.cells is not None:
        arrays["cells"] = relevancy.cells
    layers = range(analysis.model.depth)
    raw_attention = [analysis.attention(layer).mean(1) for layer in layers]
    arrays["raw_attention"] = np.stack(raw_attention, 1)
    arrays["vision_norms"] = analysis.norms()
    arrays = {name: np.asarray(values, np.float32) for name, values in arrays.items()}
    grid = analysis.place(relevancy.picture.shape[-1])
    if grid is not None:
        arrays["boxes"] = grid.boxes
    record = {
        "image_id": ID,
        "file_name": f"{ID}.png",
        "question": analysis.question,
        "prompt": analysis.batch.prompts[0],
        "caption": analysis.text.strip(),
        "generated_ids": analysis.ids,
        "tokens": analysis.tokens,
        "labels": analysis.labels,
        "groups": analysis.groups.tolist(),
        "producing": analysis.producing.tolist(),
        "layers": relevancy.layers,
        "probabilities": analysis.probabilities.tolist(),
        "visual_share": analysis.contribution("max", "share").tolist(),
        "grid": None if grid is None else {"shape": grid.shape, "size": grid.size},
    }
    return record, arrays


def summary(analysis: Analysis, shown: Shown) -> Record:
    """What the panels show, as JSON: lists over tokens, inside over layers."""
    lens = analysis.evolution()

    def words(
        ids: Iterable[Int[np.ndarray, ""]], probs: Iterable[Float[np.ndarray, ""]]
    ) -> list[tuple[str, float]]:
        return [(lens.words[int(i)], float(p)) for i, p in zip(ids, probs, strict=True)]

    top = []
    for ids, probs in zip(lens.ids, lens.probs, strict=True):
        of_layers = zip(ids, probs, strict=True)
        top.append([words(*of_layer) for of_layer in of_layers])
    contribution = {}
    for how in ("max", "sum", "mean"):
        for kind in ("share", "ratio"):
            contribution[f"{how} {kind}"] = analysis.contribution(how, kind)
    chosen = selected(analysis, shown.pat_source)
    return {
        "question": analysis.question,
        "answer": analysis.text,
        "tokens": analysis.tokens,
        "generated_ids": analysis.ids,
        "settings": vars(shown),
        "probabilities": analysis.probabilities,
        "alternatives": [of_layers[-1] for of_layers in top],
        "evolution": {
            "layers": ["embeddings", *range(analysis.model.depth)],
            "top": top,
            "probability": lens.chosen,
            "rank": lens.rank,
        },
        "visual_contribution": contribution,
        "patches": {
            "selected": chosen,
            "looked_at": looked_at(analysis, shown, chosen) if chosen else None,
        },
        "missing": analysis.missing(),
    }
