"""The tree of result files of one scale, and the summary over scales, from pairs, hidden states and
answers. No model, no drawing.

    csv/   delta_similarity_{scale}_L{n}_{tag}  delta_norm_{scale}_L{n}_{tag}
           predictions_{scale}_{tag}  summary
    json/  pred_stats_{scale}  category_validity_{scale}  sign_corrected_consistency_{scale}_{tag}
           within_cat_consistency_{scale}_{tag}
           cross_alignment_{scale}  vd_ei_{scale}  outliers_{scale}  recommended_layer_{scale}
    npz/   vectors_{scale}  cross_group_vectors_{scale}

tag = all_pairs, both_correct (original and swapped question answered right). An entry with too
little data for a value is there with null values and too_few = true; one with a value of too few
images for an interval has null limits, and n_images says why. Names as in
docs/studies/swap_analysis.md, sections 2 and 3.1, with intervals, nulls and strata added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdiag.figures import plots
from vlmdiag.runs import disk
from vlmdiag.swap import metrics
from vlmdiag.swap.accuracy import category_validity, prediction_stats
from vlmdiag.swap.layer_keys import Cells, key_of, spelled
from vlmdiag.swap.relations import CATEGORIES, GROUPS, SPLITS
from vlmdiag.swap.saved import find_scales, read_json, read_layers
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from vlmdiag.swap.metrics import Numbers
    from vlmdiag.swap.pairs import Pair, Quad

    Flags = Bool[np.ndarray, " n"]
    Deltas = Float[np.ndarray, "n 1 d"]
    States = np.ndarray  # (n, prompts, L, d)

TAGS = ("all_pairs", "both_correct")


@dataclass(frozen=True)
class Facts:
    """What is known of the n computed pairs, one entry each."""

    ids: np.ndarray
    indices: np.ndarray
    categories: np.ndarray
    groups: np.ndarray
    images: np.ndarray
    splits: np.ndarray  # "None" without one
    orig: Flags  # the original question was answered right
    swap: Flags

    @classmethod
    def of(cls, pairs: Sequence[Pair], answers: Sequence[Record]) -> Facts:
        def column(name: str, kind: type) -> np.ndarray:
            return np.array([kind(dict(pair)[name]) for pair in pairs], dtype=kind)

        def is_correct(order: str) -> Flags:
            name = f"is_correct_{order}"
            return np.array([bool(answer[name]) for answer in answers], dtype=bool)

        return cls(
            ids=column("id", str),
            indices=np.array([pair["index"] for pair in pairs]),
            categories=column("category", str),
            groups=column("group", str),
            images=column("image_id", str),
            splits=np.array([str(pair.get("split")) for pair in pairs], dtype=str),
            orig=is_correct("orig"),
            swap=is_correct("swap"),
        )

    def of_tag(self, tag: str) -> Flags:
        """Which pairs a tag stands for."""
        return self.orig & self.swap if tag == "both_correct" else np.ones(len(self.ids), bool)


def write_results(
    folder: str | Path,
    scale: str,
    pairs: Sequence[Pair],
    states: States,
    answers: Sequence[Record | None],
    layers: Sequence[int],
    rep_layers: Sequence[int],
    quads: Sequence[Quad] | None = None,
    quad_states: States | None = None,
    mask: Flags | None = None,
    quad_mask: Flags | None = None,
    total_layers: int | None = None,
    k: int = 3,
    frac: float = 0.07,
    **bootstrap: int,
) -> Record:
    """Write the tree of one scale below folder and return the recommended layer's record.

    pairs: n dicts {id, index, group, category, image_id, split}; states (n, 2, L, d) of original
    and swapped, answers: n dicts {pred_*, is_correct_*, margin_*}, * = orig, swap; layers: the L
    layer numbers, rep_layers: those of the NPZ. quads: q dicts {index, image_id, signs, split};
    quad_states (q, 4, L, d) of vertical original, swapped, distance original, swapped; None: not
    asked for. mask (n,), quad_mask (q,) bool: rows that are computed, all by default; others are
    counted as n_missing. States may be memory maps and are read one layer at a time. k, frac: of
    the recommended layers. bootstrap: num_resamples, seed. ValueError where they do not fit.
    """
    folder = Path(folder)
    layers = [int(layer) for layer in layers]
    rows = _computed(len(pairs), states, layers, mask, 2, "pairs")
    if len(answers) != len(pairs):
        raise ValueError(f"{len(answers)} answers for {len(pairs)} pairs")
    absent = sorted(set(rep_layers) - set(layers))
    if absent:
        raise ValueError(
            f"representative layers {absent} are not among the layers of the states, {layers}"
        )
    computed_pairs = [pairs[row] for row in rows]
    computed_answers = [answers[row] or {} for row in rows]
    facts = Facts.of(computed_pairs, computed_answers)
    _write_predictions(
        folder, scale, computed_pairs, computed_answers, facts, len(pairs) - len(rows)
    )
    coherence, vd = _write_deltas(folder, scale, facts, states, rows, layers, bootstrap)
    _write_vectors(folder, scale, facts, states, rows, layers, rep_layers)
    if quads is not None and quad_states is not None:
        _write_alignment(
            folder, scale, quads, quad_states, layers, rep_layers, quad_mask, bootstrap
        )
    chosen = metrics.recommend_layer(coherence, total_layers or max(layers) + 1, k, frac, vd=vd)
    path = folder / "json" / f"recommended_layer_{scale}.json"
    disk.write_json(path, {"scale": scale} | chosen)
    return chosen


def _computed(
    count: int, states: States, layers: Sequence[int], mask: Flags | None, prompts: int, of: str
) -> Int[np.ndarray, " m"]:
    """Indices of the computed rows; ValueError where states do not fit the items."""
    wanted = (count, prompts, len(layers))
    if states.ndim != 4 or states.shape[:3] != wanted:
        raise ValueError(
            f"{of}: states of shape ({count}, {prompts}, {len(layers)}, d) are wanted, got"
            f" {states.shape}"
        )
    mask = np.ones(count, bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != (count,):
        raise ValueError(f"{of}: a mask of shape ({count},) is wanted, got {mask.shape}")
    return np.flatnonzero(mask)


def _difference(
    states: States, rows: Int[np.ndarray, " m"], after: int, before: int, position: int
) -> Float[np.ndarray, "m d"]:
    """states[:, after] - states[:, before] at one layer's position, subtracted in float64."""
    swapped = np.asarray(states[rows, after, position], np.float64)
    return swapped - np.asarray(states[rows, before, position], np.float64)


def _only_layer(numbers: Numbers) -> Numbers:
    """What metrics say of deltas with one layer, without the axis of layers; deeper dicts
    likewise."""
    return {
        field: _only_layer(value) if isinstance(value, dict) else value[0]
        for field, value in numbers.items()
    }


# --- one kind of file each ------------------------------------------------------------------------


def _write_predictions(
    folder: Path,
    scale: str,
    pairs: Sequence[Pair],
    answers: Sequence[Record],
    facts: Facts,
    num_missing: int,
) -> None:
    """pred_stats, category_validity and the two lists of predictions."""
    stats = prediction_stats(facts.categories, facts.orig, facts.swap, facts.images, facts.splits)
    path = folder / "json" / f"pred_stats_{scale}.json"
    disk.write_json(path, {"scale": scale, "n_missing": num_missing} | stats)
    validity = category_validity(facts.categories, facts.orig, facts.swap, facts.images)
    disk.write_json(folder / "json" / f"category_validity_{scale}.json", validity)
    of_pair = ("index", "group", "category")
    of_answer = ("pred_orig", "pred_swap", "is_correct_orig", "is_correct_swap")
    for tag in TAGS:
        used = np.flatnonzero(facts.of_tag(tag)).tolist()
        columns: Record = {name: [dict(pairs[row])[name] for row in used] for name in of_pair}
        for name in of_answer:
            columns[name] = [answers[row][name] for row in used]
        for name in ("id", "image_id", "split"):
            columns[name] = [pairs[row].get(name) for row in used]
        for name in ("margin_orig", "margin_swap"):
            columns[name] = [answers[row].get(name) for row in used]
        plots.save_csv(folder / "csv" / f"predictions_{scale}_{tag}.csv", columns, quiet=True)


def _write_deltas(
    folder: Path,
    scale: str,
    facts: Facts,
    states: States,
    rows: Int[np.ndarray, " n"],
    layers: Sequence[int],
    bootstrap: Mapping[str, int],
) -> tuple[dict[str, dict[int, float]], dict[int, float]]:
    """Everything that is measured on the deltas of one layer. Returns ({group: {layer: coherence}},
    {layer: entanglement}) of all pairs."""
    within: dict[str, Cells] = {tag: {} for tag in TAGS}
    coherence: dict[str, Cells] = {tag: {} for tag in TAGS}
    entanglement: Cells = {}
    outliers: Cells = {}
    for position, layer in enumerate(layers):
        deltas = _difference(states, rows, 1, 0, position)[:, None]

        def of_categories(used: Flags, deltas: Deltas = deltas) -> dict[str, Numbers]:
            measured = metrics.within_category_consistency(
                deltas[used], facts.categories[used], facts.images[used]
            )
            return {category: _only_layer(numbers) for category, numbers in measured.items()}

        def of_groups(used: Flags, deltas: Deltas = deltas) -> dict[str, Numbers]:
            measured = metrics.axis_coherence(
                deltas[used], facts.categories[used], facts.images[used]
            )
            return {group: _only_layer(numbers) for group, numbers in measured.items()}

        def of_distance(used: Flags) -> Numbers:
            return of_groups(used)["distance"]

        def of_both_axes(used: Flags, deltas: Deltas = deltas) -> Numbers:
            measured = metrics.vd_entanglement(
                deltas[used], facts.categories[used], facts.images[used], **bootstrap
            )
            return _only_layer(measured)

        for tag in TAGS:
            used = facts.of_tag(tag)
            for category, numbers in of_categories(used).items():
                within[tag][category, layer] = numbers
            for group, numbers in of_groups(used).items():
                coherence[tag][group, layer] = numbers
            strata = _by_split(facts, used, of_distance, with_vertical=False)
            coherence[tag]["distance", layer]["strata"] = strata
            similarity = metrics.delta_similarity(deltas[used], facts.categories[used])
            _write_similarity(folder, f"{scale}_{key_of('', layer)}_{tag}", similarity)
            numbers = of_both_axes(used)
            numbers["strata"] = _by_split(facts, used, of_both_axes, with_vertical=True)
            if tag == "all_pairs":
                entanglement["", layer] = numbers
            else:
                entanglement["", layer][tag] = numbers
        outliers["", layer] = _only_layer(metrics.outlier_report(deltas, facts.categories))

    for tag in TAGS:
        name = f"{scale}_{tag}.json"
        disk.write_json(folder / "json" / f"within_cat_consistency_{name}", spelled(within[tag]))
        disk.write_json(
            folder / "json" / f"sign_corrected_consistency_{name}", spelled(coherence[tag])
        )
    disk.write_json(folder / "json" / f"vd_ei_{scale}.json", spelled(entanglement))
    disk.write_json(folder / "json" / f"outliers_{scale}.json", spelled(outliers))
    of_all = coherence["all_pairs"]
    curves = {group: {layer: of_all[group, layer]["mean"] for layer in layers} for group in GROUPS}
    return curves, {layer: entanglement["", layer]["eq3_raw"]["value"] for layer in layers}


def _by_split(
    facts: Facts, used: Flags, measured: Callable[[Flags], Numbers], with_vertical: bool
) -> dict[str, Numbers]:
    """{split: measured(rows)} of the distance pairs of one split, with all vertical ones beside."""
    vertical = (facts.groups == "vertical") & with_vertical
    distance = facts.groups == "distance"
    return {
        split: measured(used & (vertical | (distance & (facts.splits == split))))
        for split in SPLITS
    }


def _write_similarity(folder: Path, ending: str, similarity: Numbers) -> None:
    """The labelled 6 x 6 matrix, and each category's mean |delta|; an empty category has empty
    cells."""
    matrix = similarity["cosine"][0]
    columns: Record = {"": CATEGORIES}
    columns |= {category: matrix[:, k].tolist() for k, category in enumerate(CATEGORIES)}
    plots.save_csv(folder / "csv" / f"delta_similarity_{ending}.csv", columns, quiet=True)
    columns = {
        "category": CATEGORIES,
        "norm": similarity["norm"][0].tolist(),
        "n": similarity["n"][0].tolist(),
    }
    plots.save_csv(folder / "csv" / f"delta_norm_{ending}.csv", columns, quiet=True)


def _write_vectors(
    folder: Path,
    scale: str,
    facts: Facts,
    states: States,
    rows: Int[np.ndarray, " n"],
    layers: Sequence[int],
    rep_layers: Sequence[int],
) -> None:
    """npz/vectors: orig_L, swap_L, delta_L (n, d) float32 of each representative layer and, under
    the same ending, what each row is."""
    arrays = {
        "layers": np.array(sorted(rep_layers)),
        "ids": facts.ids,
        "image_ids": facts.images,
        "splits": facts.splits,
    }
    for layer in sorted(rep_layers):
        position = layers.index(layer)
        of_layer = {
            "orig": np.asarray(states[rows, 0, position], np.float32),
            "swap": np.asarray(states[rows, 1, position], np.float32),
            "delta": _difference(states, rows, 1, 0, position).astype(np.float32),
            "groups": facts.groups,
            "categories": facts.categories,
            "labels": facts.categories,
            "is_correct_orig": facts.orig,
            "is_correct_swap": facts.swap,
            "indices": facts.indices,
        }
        arrays |= {key_of(name, layer): array for name, array in of_layer.items()}
    disk.write_npz(folder / "npz" / f"vectors_{scale}.npz", arrays)


def _write_alignment(
    folder: Path,
    scale: str,
    quads: Sequence[Quad],
    quad_states: States,
    layers: Sequence[int],
    rep_layers: Sequence[int],
    quad_mask: Flags | None,
    bootstrap: Mapping[str, int],
) -> None:
    """cross_alignment and cross_group_vectors; deltas in the NPZ are as they are, signs (q, 2)
    beside them turn them into above and far."""
    rows = _computed(len(quads), quad_states, layers, quad_mask, 4, "quads")
    computed = [quads[row] for row in rows]
    signs = np.array([quad["signs"] for quad in computed], dtype=np.float64)
    signs = signs.reshape(len(computed), 2)
    images = np.array([str(quad["image_id"]) for quad in computed], dtype=str)
    splits = np.array([str(quad.get("split")) for quad in computed], dtype=str)
    arrays = {
        "layers": np.array(sorted(rep_layers)),
        "signs": signs,
        "image_ids": images,
        "indices": np.array([quad["index"] for quad in computed]),
    }
    alignment: Cells = {}
    for position, layer in enumerate(layers):
        vertical = _difference(quad_states, rows, 1, 0, position)
        distance = _difference(quad_states, rows, 3, 2, position)

        def of_quads(
            mine: Flags, vertical: Deltas = vertical, distance: Deltas = distance
        ) -> Numbers:
            measured = metrics.cross_alignment(
                vertical[mine, None], distance[mine, None], signs[mine], images[mine], **bootstrap
            )
            return _only_layer(measured)

        numbers = of_quads(np.ones(len(computed), bool))
        numbers["strata"] = {split: of_quads(splits == split) for split in SPLITS}
        alignment["", layer] = numbers
        if layer in rep_layers:
            arrays[key_of("delta_vert", layer)] = vertical.astype(np.float32)
            arrays[key_of("delta_dist", layer)] = distance.astype(np.float32)
    disk.write_json(folder / "json" / f"cross_alignment_{scale}.json", spelled(alignment))
    disk.write_npz(folder / "npz" / f"cross_group_vectors_{scale}.npz", arrays)


# --- over scales ----------------------------------------------------------------------------------


def write_summary(folder: str | Path) -> Path:
    """csv/summary.csv: one row per scale with accuracies, and coherence and entanglement at the
    recommended layer. Returns its path."""
    folder = Path(folder)
    scales = [_summary_of(folder, scale) for scale in find_scales(folder)]
    columns = {
        name: ["" if row[name] is None else row[name] for row in scales] for name in scales[0]
    }
    return plots.save_csv(folder / "csv" / "summary.csv", columns, quiet=True)


def _summary_of(folder: Path, scale: str) -> Record:
    """A row of the summary; None where something was not measured."""
    stats = read_json(folder, f"pred_stats_{scale}") or {}
    row: Record = {"scale": scale}
    for part in [*GROUPS, "overall", *(f"distance_{split}" for split in SPLITS)]:
        for field in ("n", "acc_orig", "acc_swap", "acc_both"):
            row[f"{part}_{field}"] = stats[f"{part}_{field}"]
    for order in ("orig", "swap", "both"):
        row[f"gap_{order}"] = stats[f"gap_{order}"]["value"]

    alignment = (read_layers(folder, f"cross_alignment_{scale}") or {}).get("", {})
    deepest = alignment[max(alignment)] if alignment else {}
    row["alignment_deepest"] = deepest.get("per_sample_mean")
    published = deepest.get("as_published", {})
    row["alignment_deepest_as_published"] = published.get("per_sample_mean")

    recommended = read_json(folder, f"recommended_layer_{scale}") or {}
    layer: Any = recommended.get("recommended")
    row["recommended_layer"] = layer
    coherence = read_layers(folder, f"sign_corrected_consistency_{scale}_all_pairs") or {}
    for group in GROUPS:
        row[f"{group}_coherence"] = coherence.get(group, {}).get(layer, {}).get("mean")
    entanglement = (read_layers(folder, f"vd_ei_{scale}") or {}).get("", {})
    vd = entanglement.get(layer, {})
    row["vd_ei"] = vd.get("eq3_raw", {}).get("value")
    row["vd_ei_crossfit"] = vd.get("eq3_raw", {}).get("crossfit")
    row["vd_group_cosine"] = vd.get("group_cosine_raw", {}).get("value")
    return row
