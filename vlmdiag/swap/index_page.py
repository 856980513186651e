"""index.html of a results folder: every figure that is there, with a sentence on what it answers.
index_page.html is the template; needs no model and draws nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import jinja2

from vlmdiag.runs import disk
from vlmdiag.swap.saved import CONDITIONS, by_samples
from vlmdiag.swap.style import WORDS, model_of

# in the order of the page, by the figure's folder, or by its name where that holds several kinds
SENTENCES = {
    "accuracy_trajectory": (
        "How often both orders of a pair are answered right, by amount of data. Two coin tosses"
        " give 0.25."
    ),
    "accuracy_group_bars": (
        "Right answers in the original order, in the swapped one, and in both, by relation."
    ),
    "accuracy_strata": (
        "Distance pairs in which the farther object is higher in the picture (consistent) or lower"
        " (counter). A gap says that depth is read off height."
    ),
    "ablation_summary": "Answers, axis coherence and alignment at one layer, by amount of data.",
    "sign_corrected": (
        "Do the deltas of a relation point along one line? 1: all do; 0: there is no axis, as with"
        " shuffled labels."
    ),
    "within_cat": "The same for each category alone, without turning its opposite.",
    "cross_alignment": (
        "Cosine of the vertical and the distance delta about the same two objects. Away from 0"
        " height and depth share a direction."
    ),
    "vd_ei": "Entanglement of vertical and distance deltas over layers. 0: separate axes.",
    "strata": (
        "Coherence and entanglement of the distance pairs of each stratum: do they depend on"
        " whether height agrees with depth?"
    ),
    "heatmap": "Cosines between the mean deltas of the six categories at one layer.",
    "pca": (
        "States and deltas along their first two principal components: do the relations lie along"
        " different lines?"
    ),
    "pca_3d": "Deltas along their first three principal components; lines join opposites.",
    "outliers": "How much of the deltas few dimensions hold, and the coherence without them.",
}
FOLDERS = {"sign_corrected_consistency": "sign_corrected", "within_cat_consistency": "within_cat"}
COMPARISON = "All scales"
# folders whose figures are folded away, in words
FOLDED = {
    "both_correct": WORDS["both_correct"],
    "all_with_validity": f"{WORDS['all_with_validity']}, unreliable categories marked",
}

_loader = jinja2.FileSystemLoader(Path(__file__).parent)
_environment = jinja2.Environment(loader=_loader, autoescape=True, trim_blocks=True)


class Entry(NamedTuple):
    """A figure of the page."""

    section: str  # COMPARISON or a scale
    group: str  # a condition, or "accuracy"
    kind: str  # of SENTENCES, or its folder
    name: str  # of the file
    link: str  # to the file, without its ending


def write_index(folder: str | Path) -> Path:
    """Write <folder>/index.html from the figures below <folder>/plots; equal figures give equal
    bytes."""
    folder = Path(folder)
    files = [*folder.glob("json/pred_stats_*.json"), *folder.glob("npz/vectors_*.npz")]
    names = {path.stem.removeprefix("pred_stats_").removeprefix("vectors_") for path in files}
    scales = sorted(names, key=by_samples)
    entries = [entry_of(path, folder, scales) for path in (folder / "plots").rglob("*.png")]
    kinds = list(SENTENCES)
    entries.sort(
        key=lambda entry: (kinds.index(entry.kind) if entry.kind in kinds else len(kinds), entry)
    )
    sections = {}
    for section in (COMPARISON, *scales):
        mine = [entry for entry in entries if entry.section == section]
        first = [entry for entry in mine if entry.group in ("accuracy", "all")]
        more = {
            words: [entry for entry in mine if entry.group == group]
            for group, words in FOLDED.items()
        }
        sections[section] = (first, {words: found for words, found in more.items() if found})
    page = _environment.get_template("index_page.html").render(
        model=model_of(folder), sections=sections, sentences=SENTENCES
    )
    disk.write_bytes(folder / "index.html", page.encode())
    return folder / "index.html"


def entry_of(path: Path, folder: Path, scales: Sequence[str]) -> Entry:
    """What the page says of one PNG."""
    group, *_ = path.relative_to(folder / "plots").parts
    name, kind = path.stem, path.parent.name
    ends = [scale for scale in scales if re.search(rf"_{re.escape(scale)}(_L\d+)?$", name)]
    section = max(ends, key=len, default=COMPARISON)
    if kind in ("cross_scale", *CONDITIONS, "accuracy"):
        kind = name.removesuffix(f"_{section}")
    link = quote(path.relative_to(folder).with_suffix("").as_posix())
    return Entry(section, group, FOLDERS.get(kind, kind), name, link)
