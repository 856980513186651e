"""The tree of result files of one scale, and the summary over scales, from pairs, hidden states and
answers. No model, no drawing.

    csv/   delta_similarity_{scale}_L{n}_{tag}  delta_norm_{scale}_L{n}_{tag}
           predictions_{scale}_{tag}  summary
    json/  pred_stats_{scale}  category_validity_{scale}  sign_corrected_consistency_{scale}_{tag}
           within_cat_consistency_{scale}_{tag}
           cross_alignment_{scale}  vd_ei_{scale}  outliers_{scale}  recommended_layer_{scale}
    npz/   vectors_{scale}  cross_group_vectors_{scale}

tag = all_pairs, both_correct (original and swapped question answered right). An entry with too
little data is there with null values and too_few = true. Names of the user's overview ("Saved
Outputs"); fields of our study's sections 2 and 3.1, with intervals, nulls and strata added.
"""

from pathlib import Path

import numpy as np

from vlmdiag.figures import plots
from vlmdiag.runs import rundirs
from vlmdiag.swap import metrics
from vlmdiag.swap.metrics import CATEGORIES, GROUPS, SPLITS
from vlmdiag.swap.saved import find_scales, read_json

TAGS = ("all_pairs", "both_correct")


def write_results(
    folder,
    scale,
    pairs,
    states,
    answers,
    layers,
    rep_layers,
    quads=None,
    quad_states=None,
    mask=None,
    quad_mask=None,
    total_layers=None,
    k=3,
    frac=0.07,
    **bootstrap,
):
    """Write the tree of one scale below folder and return the recommended layer's record.

    pairs: n dicts {id, index, group, category, image_id, split}; states (n, 2, L, d) of original
    and swapped, answers: n dicts {pred_*, is_correct_*, margin_*}, * = orig, swap; layers: the L
    layer numbers, rep_layers: those of the NPZ. quads: q dicts {index, image_id, signs, split};
    quad_states (q, 4, L, d) of vertical original, swapped, distance original, swapped; None: not
    asked for. mask (n,), quad_mask (q,) bool: rows that are computed, all by default; others are
    counted as n_missing. States may be memory maps and are read one layer at a time. k, frac: of
    the recommended layers. bootstrap: num_resamples, seed."""
    folder, layers = Path(folder), [int(layer) for layer in layers]
    rows = _computed(pairs, states, layers, mask, 2, "pairs")
    if len(answers) != len(pairs):
        raise ValueError(f"{len(answers)} answers for {len(pairs)} pairs")
    absent = sorted(set(rep_layers) - set(layers))
    if absent:
        raise ValueError(
            f"representative layers {absent} are not among the layers of the states, {layers}"
        )
    kept, said = [pairs[row] for row in rows], [answers[row] for row in rows]
    facts = _facts(kept, said)
    predictions(folder, scale, kept, said, facts, len(pairs) - len(rows))
    coherence, vd = _per_layer(folder, scale, facts, states, rows, layers, bootstrap)
    vectors(folder, scale, facts, states, rows, layers, rep_layers)
    if quads is not None:
        cross_group(folder, scale, quads, quad_states, layers, rep_layers, quad_mask, bootstrap)
    chosen = metrics.recommend_layer(coherence, total_layers or max(layers) + 1, k, frac, vd=vd)
    rundirs.write_json(
        folder / "json" / f"recommended_layer_{scale}.json", {"scale": scale} | chosen
    )
    return chosen


def _computed(items, states, layers, mask, parts, what):
    """Indices of the computed rows; ValueError where states do not fit the items."""
    if states.ndim != 4 or states.shape[:3] != (len(items), parts, len(layers)):
        raise ValueError(
            f"{what}: states of shape ({len(items)}, {parts}, {len(layers)}, d) are wanted, got"
            f" {states.shape}"
        )
    mask = np.ones(len(items), bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != (len(items),):
        raise ValueError(f"{what}: a mask of shape ({len(items)},) is wanted, got {mask.shape}")
    return np.flatnonzero(mask)


def _facts(pairs, answers):
    """{field: (n,) array} of the pairs that are there."""

    def column(items, key, kind):
        return np.array([kind(item[key]) for item in items], dtype=kind)

    facts = {
        "categories": column(pairs, "category", str),
        "groups": column(pairs, "group", str),
        "images": column(pairs, "image_id", str),
    }
    facts |= {
        "ids": column(pairs, "id", str),
        "indices": np.array([pair["index"] for pair in pairs]),
    }
    facts |= {"splits": np.array([str(pair.get("split")) for pair in pairs], dtype=str)}
    facts |= {key: column(answers, f"is_correct_{key}", bool) for key in ("orig", "swap")}
    return facts | {
        "both_correct": facts["orig"] & facts["swap"],
        "all_pairs": np.ones(len(pairs), bool),
    }


def _difference(states, rows, after, before, position):
    """(rows, d) float64: states[:, after] - states[:, before] at one layer's position, subtracted
    in float64."""
    return np.asarray(states[rows, after, position], np.float64) - np.asarray(
        states[rows, before, position], np.float64
    )


def _numbers(found):
    """The entry of the only layer: {field: (1,)} -> {field: number}; deeper dicts likewise."""
    return {
        field: _numbers(value) if isinstance(value, dict) else value[0]
        for field, value in found.items()
    }


# --- one kind of file each ------------------------------------------------------------------------


def predictions(folder, scale, pairs, answers, facts, num_missing):
    """pred_stats, category_validity and the two lists of predictions."""
    orig, swap = facts["orig"], facts["swap"]
    found = metrics.prediction_stats(
        facts["categories"], orig, swap, facts["images"], facts["splits"]
    )
    rundirs.write_json(
        folder / "json" / f"pred_stats_{scale}.json",
        {"scale": scale, "n_missing": num_missing} | found,
    )
    found = metrics.category_validity(facts["categories"], orig, swap, facts["images"])
    rundirs.write_json(folder / "json" / f"category_validity_{scale}.json", found)
    of_pair = ("index", "group", "category")
    of_answer = ("pred_orig", "pred_swap", "is_correct_orig", "is_correct_swap")
    for tag in TAGS:
        used = np.flatnonzero(facts[tag])
        columns = {key: [pairs[row][key] for row in used] for key in of_pair} | {
            key: [answers[row][key] for row in used] for key in of_answer
        }
        columns |= {
            key: [pairs[row].get(key) for row in used] for key in ("id", "image_id", "split")
        }
        columns |= {
            key: [answers[row].get(key) for row in used] for key in ("margin_orig", "margin_swap")
        }
        plots.save_csv(folder / "csv" / f"predictions_{scale}_{tag}.csv", columns, quiet=True)


def _per_layer(folder, scale, facts, states, rows, layers, bootstrap):
    """Everything that is measured on the deltas of one layer. Returns ({group: {layer: coherence}},
    {layer: entanglement}) of all pairs."""
    within, coherence = ({tag: {} for tag in TAGS} for _ in range(2))
    vd, outliers = {}, {}
    for position, layer in enumerate(layers):
        deltas, name = _difference(states, rows, 1, 0, position)[:, None], f"L{layer}"
        for tag in TAGS:
            used = facts[tag]
            mine, categories, images = (
                deltas[used],
                facts["categories"][used],
                facts["images"][used],
            )
            found = metrics.within_category_consistency(mine, categories, images, **bootstrap)
            within[tag] |= {f"{category}_{name}": _numbers(row) for category, row in found.items()}
            found = {
                group: _numbers(row)
                for group, row in metrics.axis_coherence(
                    mine, categories, images, **bootstrap
                ).items()
            }
            found["distance"]["strata"] = _strata(
                facts,
                used,
                lambda of, here=deltas: _coherence(here, facts, of, bootstrap),
                ("distance",),
            )
            coherence[tag] |= {f"{group}_{name}": row for group, row in found.items()}
            _similarity(folder, f"{scale}_{name}_{tag}", metrics.delta_similarity(mine, categories))
            found = _entanglement(deltas, facts, used, bootstrap)
            found["strata"] = _strata(
                facts,
                used,
                lambda of, here=deltas: _entanglement(here, facts, of, bootstrap),
                ("vertical", "distance"),
            )
            vd[name] = found if tag == "all_pairs" else vd[name] | {tag: found}
        outliers[name] = _numbers(metrics.outlier_report(deltas, facts["categories"]))
    for tag in TAGS:
        rundirs.write_json(
            folder / "json" / f"within_cat_consistency_{scale}_{tag}.json", within[tag]
        )
        rundirs.write_json(
            folder / "json" / f"sign_corrected_consistency_{scale}_{tag}.json", coherence[tag]
        )
    rundirs.write_json(folder / "json" / f"vd_ei_{scale}.json", vd)
    rundirs.write_json(folder / "json" / f"outliers_{scale}.json", outliers)
    curves = {
        group: {layer: coherence["all_pairs"][f"{group}_L{layer}"]["mean"] for layer in layers}
        for group in GROUPS
    }
    return curves, {layer: vd[f"L{layer}"]["eq3_raw"]["value"] for layer in layers}


def _strata(facts, used, measured, groups):
    """{split: measured(rows)}: the distance pairs of one split, with all vertical ones where groups
    holds both."""
    vertical = (
        (facts["groups"] == "vertical") if "vertical" in groups else np.zeros(len(used), bool)
    )
    return {
        split: measured(
            used & (vertical | ((facts["groups"] == "distance") & (facts["splits"] == split)))
        )
        for split in SPLITS
    }


def _coherence(deltas, facts, used, bootstrap):
    return _numbers(
        metrics.axis_coherence(
            deltas[used], facts["categories"][used], facts["images"][used], **bootstrap
        )["distance"]
    )


def _entanglement(deltas, facts, used, bootstrap):
    return _numbers(
        metrics.vd_entanglement(
            deltas[used], facts["categories"][used], facts["images"][used], **bootstrap
        )
    )


def _similarity(folder, ending, found):
    """The labelled 6 x 6 matrix, and each category's mean |delta|; an empty category has empty
    cells."""
    matrix, norm = found["cosine"][0], found["norm"][0]
    columns = {"": CATEGORIES} | {
        category: matrix[:, k].tolist() for k, category in enumerate(CATEGORIES)
    }
    plots.save_csv(folder / "csv" / f"delta_similarity_{ending}.csv", columns, quiet=True)
    columns = {"category": CATEGORIES, "norm": norm.tolist(), "n": found["n"][0].tolist()}
    plots.save_csv(folder / "csv" / f"delta_norm_{ending}.csv", columns, quiet=True)


def vectors(folder, scale, facts, states, rows, layers, rep_layers):
    """npz/vectors: orig_L, swap_L, delta_L (n, d) float32 of each representative layer and, under
    the same ending, what each row is."""
    arrays = {
        "layers": np.array(sorted(rep_layers)),
        "ids": facts["ids"],
        "image_ids": facts["images"],
        "splits": facts["splits"],
    }
    of_row = {
        "groups": "groups",
        "categories": "categories",
        "labels": "categories",
        "is_correct_orig": "orig",
        "is_correct_swap": "swap",
    }
    for layer in sorted(rep_layers):
        position = layers.index(layer)
        arrays |= {
            f"{name}_L{layer}": np.asarray(states[rows, part, position], np.float32)
            for part, name in enumerate(("orig", "swap"))
        }
        arrays[f"delta_L{layer}"] = _difference(states, rows, 1, 0, position).astype(np.float32)
        arrays |= {f"{name}_L{layer}": facts[key] for name, key in of_row.items()} | {
            f"indices_L{layer}": facts["indices"]
        }
    rundirs.write_npz(folder / "npz" / f"vectors_{scale}.npz", arrays)


def cross_group(folder, scale, quads, quad_states, layers, rep_layers, quad_mask, bootstrap):
    """cross_alignment and cross_group_vectors; deltas in the NPZ are as they are, signs (q, 2)
    beside them turn them into above and far."""
    rows = _computed(quads, quad_states, layers, quad_mask, 4, "quads")
    kept = [quads[row] for row in rows]
    signs = np.array([quad["signs"] for quad in kept], dtype=np.float64).reshape(len(kept), 2)
    images = np.array([str(quad["image_id"]) for quad in kept], dtype=str)
    arrays = {
        "layers": np.array(sorted(rep_layers)),
        "signs": signs,
        "image_ids": images,
        "indices": np.array([quad["index"] for quad in kept]),
    }
    found, splits = {}, np.array([str(quad.get("split")) for quad in kept], dtype=str)
    for position, layer in enumerate(layers):
        vertical, distance = (
            _difference(quad_states, rows, 1, 0, position),
            _difference(quad_states, rows, 3, 2, position),
        )
        found[f"L{layer}"] = _aligned(vertical, distance, signs, images, bootstrap)
        found[f"L{layer}"]["strata"] = {
            split: _aligned(vertical[mine], distance[mine], signs[mine], images[mine], bootstrap)
            for split, mine in ((name, splits == name) for name in SPLITS)
        }
        if layer in rep_layers:
            arrays |= {
                f"delta_vert_L{layer}": vertical.astype(np.float32),
                f"delta_dist_L{layer}": distance.astype(np.float32),
            }
    rundirs.write_json(folder / "json" / f"cross_alignment_{scale}.json", found)
    rundirs.write_npz(folder / "npz" / f"cross_group_vectors_{scale}.npz", arrays)


def _aligned(vertical, distance, signs, images, bootstrap):
    return _numbers(
        metrics.cross_alignment(vertical[:, None], distance[:, None], signs, images, **bootstrap)
    )


# --- over scales ----------------------------------------------------------------------------------


def write_summary(folder):
    """csv/summary.csv: one row per scale with accuracies, and coherence and entanglement at the
    recommended layer. Returns its path."""
    folder = Path(folder)
    rows = [_summary_row(folder, scale) for scale in find_scales(folder)]
    return plots.save_csv(
        folder / "csv" / "summary.csv",
        {key: ["" if row[key] is None else row[key] for row in rows] for key in rows[0]},
        quiet=True,
    )


def _summary_row(folder, scale):
    stats = read_json(folder, f"pred_stats_{scale}")
    parts = [*GROUPS, "overall", *(f"distance_{split}" for split in SPLITS)]
    row = {"scale": scale} | {
        f"{part}_{field}": stats[f"{part}_{field}"]
        for part in parts
        for field in ("n", "acc_orig", "acc_swap", "acc_both")
    }
    row |= {f"gap_{kind}": stats[f"gap_{kind}"]["value"] for kind in ("orig", "swap", "both")}
    alignment = read_json(folder, f"cross_alignment_{scale}") or {}
    deepest = alignment.get(max(alignment, key=lambda name: int(name[1:]), default=None)) or {}
    row |= {
        "alignment_deepest": deepest.get("per_sample_mean"),
        "alignment_deepest_as_published": deepest.get("as_published", {}).get("per_sample_mean"),
    }
    layer = (read_json(folder, f"recommended_layer_{scale}") or {}).get("recommended")
    coherence = read_json(folder, f"sign_corrected_consistency_{scale}_all_pairs") or {}
    row |= {"recommended_layer": layer} | {
        f"{group}_coherence": coherence.get(f"{group}_L{layer}", {}).get("mean") for group in GROUPS
    }
    vd = (read_json(folder, f"vd_ei_{scale}") or {}).get(f"L{layer}", {})
    fields = {
        "vd_ei": ("eq3_raw", "value"),
        "vd_ei_crossfit": ("eq3_raw", "crossfit"),
        "vd_group_cosine": ("group_cosine_raw", "value"),
    }
    return row | {name: vd.get(form, {}).get(field) for name, (form, field) in fields.items()}
