"""The figures of the swap-pair analysis from planted result trees: directions recovered, signs that
do not depend on the input's order, gaps said, files written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from matplotlib.colors import to_rgb
from PIL import Image

from tests.conftest import in_process
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.runs.rundirs import write_json, write_npz
from vlmdiag.swap import figures, figures_pca, figures_scales, index_page, saved
from vlmdiag.swap import style as look
from vlmdiag.swap.relations import GROUPS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "swap_analysis"
SCRIPTS = ("pca_2d_recolor", "pca_3d", "accuracy_chart", "unify_consistency_ylim")
CATEGORIES = list(look.CATEGORY_COLORS)
GROUP_OF = {name: group for group, pair in GROUPS.items() for name in pair}
STRENGTH = {"horizontal": 3.0, "vertical": 2.0, "distance": 1.0}


def planted_axes(width, entangled=0.0):
    """Three unit directions (3, width): the third leans towards the second by a given cosine."""
    axes = np.linalg.qr(np.random.default_rng(3).normal(size=(width, 3)))[0].T
    axes[2] = entangled * axes[1] + np.sqrt(1 - entangled**2) * axes[2]
    return axes


def planted_pairs(n=20, width=24, noise=0.5, entangled=0.0, seed=0, layers=(1, 3)):
    """Arrays of vectors_{scale}.npz whose deltas lie along planted axes; canonical categories are
    positive."""
    rng, axes, arrays = np.random.default_rng(seed), planted_axes(width, entangled), {}
    categories = np.repeat(CATEGORIES, n)
    groups = np.array([GROUP_OF[name] for name in categories])
    sign = np.array([1.0 if name in ("left", "above", "far") else -1.0 for name in categories])
    direction = np.array(
        [STRENGTH[group] * axes[list(GROUP_OF.values()).index(group) // 2] for group in groups]
    )
    right = rng.random((2, len(categories))) < 0.8
    for layer in layers:
        grown = (layer + 1) / (max(layers) + 1)
        scene = rng.normal(size=(len(categories), width)) * noise
        delta = grown * sign[:, None] * direction + noise * rng.normal(
            size=(len(categories), width)
        )
        arrays |= {
            f"orig_L{layer}": scene - delta / 2,
            f"swap_L{layer}": scene + delta / 2,
            f"delta_L{layer}": delta,
        }
        arrays |= {
            f"groups_L{layer}": groups,
            f"categories_L{layer}": categories,
            f"indices_L{layer}": np.arange(len(categories)),
        }
        arrays |= {f"is_correct_orig_L{layer}": right[0], f"is_correct_swap_L{layer}": right[1]}
    return {
        name: values.astype(np.float32) if values.dtype == np.float64 else values
        for name, values in arrays.items()
    }


def plant(folder, scales=("vanilla", "80k", "400k"), n=20, layers=8, rep=(1, 3), width=24):
    """results/<model> with every file of the tree. The last category pair is unreliable in the
    first scale and has no both-correct pair there."""
    for place, scale in enumerate(scales):
        rng, skill = np.random.default_rng(place), (place + 1) / len(scales)
        depth = np.arange(layers)
        rise = (
            1
            / (1 + np.exp(-(depth - 0.55 * layers) * 9 / layers))
            * np.where(depth > 0.85 * layers, 0.85, 1)
        )
        stats, validity = {"scale": scale}, {}
        for group, pair in GROUPS.items():
            both = {"horizontal": 0.72, "vertical": 0.6, "distance": 0.0 if place == 0 else 0.35}[
                group
            ] + 0.2 * skill * (place > 0)
            stats |= {
                f"{group}_n": 2 * n,
                f"{group}_acc_orig": min(both + 0.15, 1),
                f"{group}_acc_swap": min(both + 0.1, 1),
                f"{group}_acc_both": both,
            }
            for order in ("orig", "swap", "both"):
                stats[f"{group}_acc_{order}_low"] = max(stats[f"{group}_acc_{order}"] - 0.06, 0)
                stats[f"{group}_acc_{order}_high"] = min(stats[f"{group}_acc_{order}"] + 0.06, 1)
            for name in pair:
                poor = group == "distance" and place == 0
                good = (0.02, 0.88) if name == "far" else (0.91, 0.03)
                validity[name] = {
                    "n": n,
                    "acc_orig": good[0] if poor else 0.8,
                    "acc_swap": good[1] if poor else 0.78,
                    "reliable": not poor,
                }
        stats |= {
            f"overall_{key}": np.mean([stats[f"{group}_{key}"] for group in GROUPS])
            for key in ("acc_orig", "acc_swap", "acc_both")
        }
        write_json(folder / f"json/pred_stats_{scale}.json", stats | {"overall_n": 6 * n})
        write_json(folder / f"json/category_validity_{scale}.json", validity)
        for tag in ("all_pairs", "both_correct"):
            few = {"distance"} if tag == "both_correct" and place == 0 else set()
            peak = {
                "horizontal": 0.35 + 0.15 * skill,
                "vertical": 0.25 + 0.4 * skill,
                "distance": 0.05 + 0.08 * skill,
            }
            coherence, within = {}, {}
            for layer in range(layers):
                for group, pair in GROUPS.items():
                    mean = peak[group] * rise[layer] + 0.008 * rng.normal()
                    cell = {
                        "mean": mean,
                        "std": 0.2,
                        "n": 2 * n,
                        "low": mean - 0.03,
                        "high": mean + 0.03,
                        "null_mean": -0.002,
                        "null_std": 0.004,
                    }
                    coherence[f"{group}_L{layer}"] = (
                        {"mean": None, "std": None, "n": 1, "too_few": True}
                        if group in few
                        else cell
                    )
                    for name in pair:
                        here = mean * (1.08 if name == pair[0] else 0.97)
                        cell = {
                            "mean": here,
                            "std": 0.2,
                            "n": n,
                            "low": here - 0.04,
                            "high": here + 0.04,
                        }
                        within[f"{name}_L{layer}"] = (
                            {"mean": None, "std": None, "n": 0, "too_few": True}
                            if group in few
                            else cell
                        )
            write_json(folder / f"json/sign_corrected_consistency_{scale}_{tag}.json", coherence)
            write_json(folder / f"json/within_cat_consistency_{scale}_{tag}.json", within)
            arrays = planted_pairs(n, width, entangled=0.5 - 0.2 * skill, seed=place, layers=rep)
            for layer in rep:
                names = [name for name in CATEGORIES if GROUP_OF[name] not in few]
                means = [
                    arrays[f"delta_L{layer}"][arrays[f"categories_L{layer}"] == name].mean(axis=0)
                    for name in names
                ]
                unit = np.array([mean / np.linalg.norm(mean) for mean in means])
                (folder / "csv").mkdir(parents=True, exist_ok=True)
                rows = ["," + ",".join(names)] + [
                    f"{name}," + ",".join(f"{value:.6f}" for value in row)
                    for name, row in zip(names, unit @ unit.T, strict=True)
                ]
                (folder / f"csv/delta_similarity_{scale}_L{layer}_{tag}.csv").write_text(
                    "\n".join(rows) + "\n"
                )
        alignment, index = {}, {}
        for layer in range(layers):
            mean = (0.3 - 0.2 * skill) * rise[layer]
            alignment[f"L{layer}"] = {
                "per_sample_mean": mean,
                "per_sample_std": 0.1,
                "mean_delta_alignment": 1.6 * mean,
                "permutation_mean": 0.6 * mean,
                "permutation_std": 0.012,
                "n_samples": 33,
                "p_value": 0.001 if mean > 0.05 else 0.4,
            }
            forms = {"n_images": n}
            for form, times in (
                ("eq3_raw", 1.5),
                ("eq3_raw_crossfit", 1.7),
                ("group_cosine_raw", 1.6),
            ):
                forms |= {
                    form: times * mean,
                    f"{form}_low": times * mean - 0.05,
                    f"{form}_high": times * mean + 0.05,
                }
            few = {"n_images": 0, "eq3_raw": None, "too_few": True}
            index[f"L{layer}"] = forms | {
                "both_correct": few if place == 0 else forms | {"n_images": n - 5}
            }
        write_json(folder / f"json/cross_alignment_{scale}.json", alignment)
        write_json(folder / f"json/vd_ei_{scale}.json", index)
        if place == 0:
            for layer in rep:
                arrays[f"is_correct_orig_L{layer}"] &= arrays[f"groups_L{layer}"] != "distance"
        write_npz(folder / f"npz/vectors_{scale}.npz", arrays)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results/tiny with three scales."""
    root = tmp_path_factory.mktemp("results")
    plant(root / "tiny", rep=(3,))
    return root


def settings_of(path):
    return json.loads(Image.open(path).text["settings"])


def texts(fig):
    """Every word on a figure: legends, titles, ticks, free text."""
    return "\n".join(text.get_text() for text in fig.findobj(plots.plt.Text))


@pytest.fixture
def drawn(monkeypatch):
    """[(path, figure)] of what is saved; nothing is rendered, so this is quick."""
    kept = []

    def keep(fig, path, settings, show=False, quiet=False):
        kept.append((Path(path), fig))
        return [Path(f"{path}.png"), Path(f"{path}.pdf")]

    monkeypatch.setattr(figures.plots, "save", keep)
    yield kept
    plots.plt.close("all")


# ---- PCA ----


def test_components_are_the_planted_directions_and_point_to_left_above_far():
    arrays = planted_pairs(n=80, noise=0.2, layers=(3,))
    found = figures_pca.pca(arrays["delta_L3"], arrays["delta_L3"], arrays["categories_L3"])
    cosines = np.sum(found.axes * planted_axes(24), axis=1)
    assert np.all(cosines > 0.99), cosines
    planted = np.array([9, 4, 1]) / 3 + 0.2**2  # each axis is that of a third of the pairs
    np.testing.assert_allclose(found.explained, planted / (14 / 3 + 24 * 0.2**2), atol=0.02)
    for component, name in enumerate(("left", "above", "far")):
        assert found.points[arrays["categories_L3"] == name, component].mean() > 0.5


def test_planted_entanglement_shows_as_far_on_the_side_of_above():
    arrays = planted_pairs(n=80, noise=0.2, entangled=0.8, layers=(3,))
    found = figures_pca.pca(arrays["delta_L3"], arrays["delta_L3"], arrays["categories_L3"])
    means = {
        name: found.points[arrays["categories_L3"] == name].mean(axis=0) for name in CATEGORIES
    }
    assert means["far"][1] > 0.5 and means["close"][1] < -0.5


def test_pca_does_not_depend_on_the_order_or_side_of_its_input():
    arrays = planted_pairs(layers=(3,))
    orig, swap, deltas, names = (
        arrays[f"{name}_L3"] for name in ("orig", "swap", "delta", "categories")
    )
    order = np.random.default_rng(5).permutation(len(names))
    straight, mixed = (
        figures_pca.pca(deltas, deltas, names),
        figures_pca.pca(deltas[order], deltas[order], names[order]),
    )
    np.testing.assert_allclose(mixed.points, straight.points[order], atol=1e-5)
    np.testing.assert_allclose(mixed.axes, straight.axes, atol=1e-5)
    one, other = (
        figures_pca.pca(np.concatenate([orig, swap]), deltas, names),
        figures_pca.pca(np.concatenate([swap, orig]), deltas, names),
    )
    np.testing.assert_allclose(other.points, np.roll(one.points, len(names), axis=0), atol=1e-5)
    flipped = figures_pca.pca(
        -deltas, -deltas, names
    )  # every question asked the other way round: the axes turn, the picture stays
    np.testing.assert_allclose(flipped.points, straight.points, atol=1e-5)
    np.testing.assert_allclose(flipped.axes, -straight.axes, atol=1e-5)
    mirrored = figures_pca.pca(
        deltas[:, ::-1], deltas[:, ::-1], names
    )  # dimensions in another order
    np.testing.assert_allclose(mirrored.points, straight.points, atol=1e-5)


def test_without_a_canonical_category_the_largest_loading_is_positive():
    deltas = np.random.default_rng(0).normal(size=(9, 5))
    for vectors in (deltas, -deltas):
        axes = figures_pca.pca(vectors, vectors, np.array(["right"] * 9)).axes
        assert all(axis[np.argmax(np.abs(axis))] > 0 for axis in axes)


def test_components_beyond_the_rank_are_zero_and_equal_rows_explain_nothing():
    line = np.outer(np.arange(6.0), np.ones(4))
    found = figures_pca.pca(line, line, np.array(["left"] * 6))
    assert found.explained[0] == pytest.approx(1) and np.all(found.points[:, 1:] == 0)
    assert figures_pca.pca(line[:2, :1], line[:2, :1], np.array(["left"] * 2)).points.shape == (
        2,
        3,
    )
    same = figures_pca.pca(np.ones((5, 4)), np.ones((5, 4)), np.array(["far"] * 5))
    assert np.all(same.points == 0) and np.isnan(same.explained).all()


# ---- files ----


def test_one_scale_gives_every_figure_of_the_tree_with_its_settings(results, capsys):
    written = figures.draw_scale(results / "tiny", "vanilla", quiet=True, all_figures=True)
    assert capsys.readouterr().out == ""
    names = {str(path.relative_to(results / "tiny/plots").with_suffix("")) for path in written}
    families = (
        "within_cat_consistency/within_cat_vanilla",
        "sign_corrected_consistency/sign_corrected_vanilla",
        "heatmap/heatmap_vanilla_L3",
        "pca/pca_vanilla_L3",
        "pca_3d/pca_vanilla_L3",
    )
    expected = {f"{condition}/{name}" for condition in saved.CONDITIONS for name in families}
    assert names == expected | {
        f"{c}/cross_alignment/cross_alignment_vanilla" for c in ("all", "all_with_validity")
    } | {"accuracy/accuracy_group_bars_vanilla"}
    assert all(path.stat().st_size > 3000 for path in written) and {
        path.suffix for path in written
    } == {".png", ".pdf"}
    found = settings_of(results / "tiny/plots/both_correct/pca/pca_vanilla_L3.png")
    assert found == {
        "results": "tiny",
        "condition": "both_correct",
        "tag": "both_correct",
        "scale": "vanilla",
        "layer": 3,
    }


def names_of(drawn, folder):
    return {str(path.relative_to(folder / "plots")) for path, _ in drawn}


def test_without_all_figures_the_few_that_answer_the_question_are_drawn(tmp_path, drawn):
    folder = plant(tmp_path / "tiny", scales=("vanilla", "80k"), rep=(1, 3, 5))
    figures.draw_scale(folder, "vanilla")
    assert names_of(drawn, folder) == {
        "all/sign_corrected_consistency/sign_corrected_vanilla",
        "all/cross_alignment/cross_alignment_vanilla",
        "all/heatmap/heatmap_vanilla_L5",  # of 0 to 7; three quarters of the depth
        "all/pca/pca_vanilla_L5",
        "accuracy/accuracy_group_bars_vanilla",
    }
    drawn.clear()
    figures_scales.draw_merge(folder, ["vanilla", "80k"])
    cross = ("sign_corrected", "cross_alignment", "vd_ei", "ablation_summary")
    assert names_of(drawn, folder) == {
        "accuracy/accuracy_trajectory",
        *(f"all/cross_scale/{name}" for name in cross),
    }


def test_the_page_lists_every_figure_once_with_its_sentence(tmp_path, drawn):
    folder = plant(tmp_path / "tiny__run & <2>", scales=("vanilla", "80k"), rep=(3,))
    for scale in ("vanilla", "80k"):
        figures.draw_scale(folder, scale, all_figures=True)
        plots.plt.close("all")
    figures_scales.draw_merge(folder, ["vanilla", "80k"], all_figures=True)
    for path, _ in drawn:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").touch()
    page = index_page.write_index(folder).read_text()
    links = [f'<img src="{path.relative_to(folder).as_posix()}.png"' for path, _ in drawn]
    assert len(set(links)) == len(drawn) and all(page.count(link) == 1 for link in links)
    sections = re.split("<h2 ", page)[1:]
    assert [section.split(">")[1].split("<")[0] for section in sections] == [
        "All scales",
        "vanilla",
        "80k",
    ]
    assert all("80k_L3" in link or "80k" not in link for link in sections[1].split("img src"))
    captions = re.findall(r"<figcaption>(.*)", page)
    assert len(captions) == len(drawn) and set(captions) <= {
        str(escape(sentence)) for sentence in index_page.SENTENCES.values()
    }
    assert "tiny, run &amp; &lt;2&gt;" in page and "<2>" not in page
    assert index_page.write_index(folder).read_text() == page


def test_all_scales_give_the_comparing_figures(results, drawn):
    figures_scales.draw_merge(results / "tiny", ["vanilla", "80k", "400k"], all_figures=True)
    names = {str(path.relative_to(results / "tiny/plots")) for path, _ in drawn}
    cross = {
        "all": ("sign_corrected", "within_cat", "cross_alignment", "vd_ei", "ablation_summary"),
        "all_with_validity": ("sign_corrected", "within_cat"),
        "both_correct": ("sign_corrected", "within_cat", "vd_ei", "ablation_summary"),
    }
    expected = {
        f"{condition}/cross_scale/{name}" for condition, found in cross.items() for name in found
    }
    assert names == expected | {"accuracy/accuracy_group_bars", "accuracy/accuracy_trajectory"}
    panels = {path.name: fig.axes for path, fig in drawn if path.parts[-3] == "all"}
    assert [ax.get_title() for ax in panels["sign_corrected"]] == [
        f"{group} (n = 40)" for group in GROUPS
    ]
    assert [ax.get_title().split(" (n")[0] for ax in panels["vd_ei"]] == list(
        figures_scales.ENTANGLEMENT_PANELS
    )
    lines = {line.get_label(): line for line in panels["sign_corrected"][1].lines}
    colors = look.scale_colors(["vanilla", "80k", "400k"])
    assert lines["80k"].get_color() == colors["80k"] and len(lines["80k"].get_xdata()) == 8


# ---- too few, unreliable, missing ----


def test_categories_without_pairs_are_grey_gaps_that_the_figure_names(results, drawn):
    figures.draw_heatmaps(results / "tiny", "vanilla", "both_correct")
    figures.draw_consistency(
        results / "tiny", "vanilla", "both_correct", "sign_corrected_consistency"
    )
    figures_scales.draw_cross_consistency(
        results / "tiny", ["vanilla", "80k"], "both_correct", "sign_corrected_consistency"
    )
    heat, curve, cross = (fig for _, fig in drawn)
    assert "grey: too few pairs (far, close)" in texts(heat)
    cells = heat.axes[0].images[0].get_array()
    assert np.ma.getmaskarray(cells)[4:].all() and not np.ma.getmaskarray(cells)[:4, :4].any()
    assert "distance: too few pairs (n = 1)" in texts(curve)
    assert "vanilla: too few pairs (n = 1)" in texts(cross)


def test_a_null_in_the_middle_is_a_gap_with_its_layer(tmp_path, drawn):
    cells = {
        f"horizontal_L{layer}": {"mean": 0.1 * layer, "std": 0.1, "n": 9, "low": 0.0, "high": 1.0}
        for layer in range(5)
    }
    cells["horizontal_L2"] = {
        "mean": None,
        "std": None,
        "n": 1,
        "low": None,
        "high": None,
        "too_few": True,
    }
    write_json(tmp_path / "json/sign_corrected_consistency_a_all_pairs.json", cells)
    figures.draw_consistency(tmp_path, "a", "all", "sign_corrected_consistency")
    line = drawn[0][1].axes[0].lines[0]
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False, False]
    assert line.get_label() == "horizontal (n = 9); too few at L2"


@pytest.mark.parametrize("n", [0, 1])
def test_pca_of_one_pair_or_none_says_that_they_are_too_few(tmp_path, n):
    pairs = planted_pairs(n=4, layers=(1,))
    one = {name: values[:n] for name, values in pairs.items()}
    write_npz(tmp_path / "npz/vectors_a.npz", one)
    written = figures_pca.draw_pca(tmp_path, "a", ["all"], quiet=True)
    assert len(written) == 4 and all(path.stat().st_size > 3000 for path in written)


def test_two_pairs_are_drawn(tmp_path, drawn):
    write_npz(
        tmp_path / "npz/vectors_a.npz",
        {name: values[:2] for name, values in planted_pairs(n=4, layers=(1,)).items()},
    )
    figures_pca.draw_pca(tmp_path, "a", ["all"])
    assert "too few" not in texts(drawn[0][1]) and "left (n = 2)" in texts(drawn[0][1])


def test_rows_with_an_overflow_are_left_out(tmp_path, drawn):
    arrays = planted_pairs(n=5, layers=(1,))
    arrays["delta_L1"][0, 3] = np.inf
    write_npz(tmp_path / "npz/vectors_a.npz", arrays)
    figures_pca.draw_pca(tmp_path, "a", ["all"], ["pca"])
    assert "left (n = 4)" in texts(drawn[0][1]) and "right (n = 5)" in texts(drawn[0][1])


def test_strata_and_outliers_are_the_numbers_of_their_files(tmp_path, drawn):
    def strata(value, n):
        return {
            "consistent": {"mean": value, "low": value - 0.1, "high": value + 0.1, "n": n},
            "counter": {"mean": None, "n": 0},
        }

    coherence = {f"{group}_L{layer}": {"mean": 0.5, "n": 9} for group in GROUPS for layer in (0, 1)}
    for layer in (0, 1):
        coherence[f"distance_L{layer}"]["strata"] = strata((0.2, 0.3)[layer], 7)
    write_json(tmp_path / "json/sign_corrected_consistency_a_all_pairs.json", coherence)
    index = {"eq3_raw": {"value": -0.6, "low": -0.7, "high": -0.5}, "n": {"far": 3, "close": 4}}
    write_json(
        tmp_path / "json/vd_ei_a.json",
        {f"L{layer}": {"strata": {"counter": index}} for layer in (0, 1)},
    )
    part = {
        "coherence": dict.fromkeys(GROUPS, 0.4),
        "coherence_without": dict.fromkeys(GROUPS, 0.1),
        "share": [0.5, 0.9],
        "n": 8,
    }
    write_json(tmp_path / "json/outliers_a.json", {"L0": part, "L1": part})
    figures.draw_strata(tmp_path, "a")
    figures.draw_outliers(tmp_path, "a")
    (_, strata_figure), (_, outlier_figure) = drawn
    left, right = (
        [line for line in ax.lines if not line.get_label().startswith("_")]
        for ax in strata_figure.axes
    )
    assert [(line.get_label(), line.get_ydata().tolist()) for line in left] == [
        ("consistent (n = 7)", [0.2, 0.3])
    ]  # no counter pairs, no line
    assert [(line.get_label(), line.get_ydata().tolist()) for line in right] == [
        ("counter (n = 7)", [-0.6, -0.6])
    ]
    energy, axes = (
        {line.get_label(): list(line.get_ydata()) for line in ax.lines}
        for ax in outlier_figure.axes
    )
    assert (
        energy["the largest"] == [0.5, 0.5]
        and energy["the 2 largest"] == [0.9, 0.9]
        and axes["vertical"] == [0.4, 0.4]
    )
    write_json(
        tmp_path / "json/pred_stats_a.json",
        {
            "distance_counter_n": 4,
            "distance_counter_acc_both": 0.25,
            "gap_both": {"value": 0.5, "low": 0.2, "high": 0.8},
        },
    )
    figures_scales.draw_accuracy_strata(tmp_path, ["a"])
    ax = drawn[2][1].axes[0]
    words = [text.get_text() for text in ax.texts]
    # no bar for a stratum without pairs
    assert [bar.get_height() for bar in ax.patches] == [0.25] and words.count("none") == 2
    assert "gap +0.50\n(+0.20 to +0.80)" in words
    write_json(
        tmp_path / "json/pred_stats_a.json",
        {
            "distance_counter_n": 1,
            "distance_counter_acc_both": 0.0,
            "gap_both": {"value": 0.97, "low": None, "high": None, "too_few": True},
        },
    )
    figures_scales.draw_accuracy_strata(tmp_path, ["a"])
    words = texts(drawn[3][1])
    assert "gap: too\nfew pairs" in words and "0.97" not in words  # of one pair
    assert (
        figures.draw_strata(tmp_path, "none")
        == figures.draw_outliers(tmp_path, "none")
        == figures_scales.draw_accuracy_strata(tmp_path, ["none"])
        == []
    )


def test_unreliable_categories_carry_a_dagger_only_where_validity_is_asked_for(results, drawn):
    for condition in ("all", "all_with_validity"):
        figures.draw_consistency(results / "tiny", "vanilla", condition, "within_cat_consistency")
        figures.draw_heatmaps(results / "tiny", "vanilla", condition)
        figures.draw_alignment(results / "tiny", "vanilla", condition)
    plain, marked = [texts(fig) for _, fig in drawn[:3]], [texts(fig) for _, fig in drawn[3:]]
    assert not any("\u2020" in text for text in plain)
    assert all("far 0.02 / 0.88, close 0.91 / 0.03" in text for text in marked)
    assert (
        "far \u2020" in marked[0]
        and "left \u2020" not in marked[0]
        and "distance \u2020" in marked[2]
    )


def test_a_group_without_pairs_has_no_bar_and_says_so(tmp_path, drawn):
    cells = {
        f"{group}_{key}": 0.5
        for group in ("horizontal", "vertical", "overall")
        for key in ("acc_orig", "acc_swap", "acc_both")
    }
    cells |= {
        "horizontal_n": 8,
        "vertical_n": 6,
        "overall_n": 14,
        "distance_n": 0,
        "distance_acc_orig": 0,
        "distance_acc_swap": 0,
        "distance_acc_both": 0,
    }
    write_json(tmp_path / "json/pred_stats_a.json", cells)
    figures_scales.draw_accuracy_bars(tmp_path, ["a"])
    of_distance = drawn[0][1].axes[2]
    assert not of_distance.patches and len(drawn[0][1].axes[0].patches) == 3
    assert (
        "no pairs" in texts(drawn[0][1])
        and "distance (n = 0)" in texts(drawn[0][1])
        and "horizontal (n = 8)" in texts(drawn[0][1])
    )


def test_chance_of_both_orders_is_a_quarter_in_every_figure_of_accuracy(results, drawn):
    folder, scales = results / "tiny", ["vanilla", "80k"]
    figures_scales.draw_accuracy_bars(folder, scales)
    figures_scales.draw_accuracy_trajectory(folder, scales)
    figures_scales.draw_ablation(folder, scales)
    for _, fig in drawn:
        ax = fig.axes[0]
        levels = {
            line.get_label(): line.get_ydata()[0]
            for line in ax.lines
            if line.get_label().startswith("chance")
        }
        one_order = levels.pop("chance, one order", 0.5)
        assert one_order == 0.5 and list(levels.values()) == [0.25]


def test_a_figure_with_validity_says_where_it_equals_the_one_without(results, drawn):
    for scale in ("vanilla", "80k"):
        figures.draw_heatmaps(results / "tiny", scale, "all_with_validity")
        figures_pca.draw_pca(results / "tiny", scale, ["all_with_validity"])
    figures.draw_heatmaps(results / "tiny", "80k", "all")
    said = [look.ALL_RELIABLE in texts(fig) for _, fig in drawn]
    assert said == [False] * 3 + [True] * 3 + [False]


def test_both_spellings_of_under_are_one_category(tmp_path, drawn):
    write_json(
        tmp_path / "json/within_cat_consistency_a_all_pairs.json",
        {f"{name}_L0": {"mean": 0.5, "n": 4} for name in ("above", "below")},
    )
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/delta_similarity_a_L0_all_pairs.csv").write_text(
        ",above,below\nabove,1,-0.9\nbelow,-0.9,1\n"
    )
    figures.draw_consistency(tmp_path, "a", "all", "within_cat_consistency")
    figures.draw_heatmaps(tmp_path, "a", "all")
    assert drawn[0][1].axes[0].lines[1].get_color() == look.CATEGORY_COLORS["under"]
    assert "\u22120.90" in texts(drawn[1][1]) and "(left, right, far, close)" in texts(drawn[1][1])


def test_the_entanglement_index_is_read_flat_nested_or_bare(tmp_path):
    flat = {
        "eq3_raw": 0.4,
        "eq3_raw_low": 0.3,
        "eq3_raw_high": 0.5,
        "eq3_raw_crossfit": None,
        "n_images": 7,
    }
    nested = {
        "eq3_raw": {"value": 0.4, "low": 0.3, "high": 0.5, "crossfit": None, "too_few": False},
        "n": {"above": 9},
        "n_images": 7,
    }
    for cell in (flat, nested):
        write_json(
            tmp_path / "json/vd_ei_a.json",
            {"L3": cell | {"strata": {"counter": cell}, "both_correct": cell}},
        )
        for condition in ("all", "both_correct"):
            (curve,) = figures_scales.read_entanglement(tmp_path, "a", condition).values()
            assert {name: float(values[0]) for name, values in curve.items()} == {
                "layer": 3,
                "mean": 0.4,
                "low": 0.3,
                "high": 0.5,
                "n": 7,
            }
    write_json(tmp_path / "json/vd_ei_a.json", {"3": 0.4, "L4": None})
    assert figures_scales.read_entanglement(tmp_path, "a", "all")["index"]["mean"].tolist()[:1] == [
        0.4
    ]
    assert figures_scales.read_entanglement(tmp_path, "a", "both_correct") == {}


# ---- colours and scales ----


def lightness(color):
    return np.dot(to_rgb(color), (0.2126, 0.7152, 0.0722))


def test_more_data_is_darker_whatever_the_order_and_other_models_stand_out():
    scales = ["scale1", "scale2", "scale10", "400k", "2m", "full"]
    colors = look.scale_colors(scales[::-1] + ["roborefer"])
    light = [lightness(colors[scale]) for scale in scales]
    assert light == sorted(light, reverse=True) and min(-np.diff(light)) > 0.03
    assert light[0] < 0.8  # the lightest is seen on white
    assert colors["roborefer"] in look.OTHER_SCALES
    assert look.scale_colors(["full"])["full"] == colors["full"]  # alone: dark
    others = look.scale_colors(["independent", "correlated"])
    assert len(set(others.values())) == 2 and set(others.values()) <= set(look.OTHER_SCALES)


def test_scales_are_ordered_by_their_data(tmp_path):
    for scale in ("roborefer", "2m", "80k", "vanilla", "1.5m", "full", "scale2", "scale10"):
        write_json(tmp_path / f"json/pred_stats_{scale}.json", {})
    assert saved.find_scales(tmp_path) == [
        "vanilla",
        "scale2",
        "scale10",
        "80k",
        "1.5m",
        "2m",
        "full",
        "roborefer",
    ]
    assert saved.find_scales(tmp_path, ["2m", "vanilla"]) == ["2m", "vanilla"]


def test_a_scale_without_a_data_scale_is_a_point_beside_the_line(results, drawn):
    plots.plt.figure()
    _, ax = plots.plt.subplots()
    figures_scales._over_scales(
        ax, ["vanilla", "80k", "roborefer"], np.array([0.1, 0.2, 0.9]), "k", "both"
    )
    assert [line.get_xdata().tolist() for line in ax.lines] == [[0, 1], [2]]


# ---- the scripts ----


@pytest.fixture(scope="module")
def scripts():
    return {name: in_process(FOLDER / f"{name}.py") for name in SCRIPTS}


def test_unify_gives_every_consistency_figure_of_a_model_the_same_limits(results, scripts):
    done = scripts["unify_consistency_ylim"](
        "--results_dir", results, "--model", "tiny", "--scales", "vanilla", "400k"
    )
    assert done.returncode == 0, done.stderr
    files = [
        path
        for family in saved.FAMILIES
        for path in (results / "tiny/plots").glob(f"*/{family}/*.png")
    ]
    limits = [settings_of(path)["ylim"] for path in files if "80k" not in path.name]
    assert len(limits) == 2 * 2 * 3 and all(limit == limits[0] for limit in limits)
    curves = [
        saved.read_curves(results / "tiny", f"{stem}_400k_all_pairs") for stem in saved.FAMILIES
    ]
    assert limits[0][1] > max(curve["high"].max() for found in curves for curve in found.values())


def test_the_limits_are_on_the_axes(results, drawn):
    limits = figures.consistency_range(results / "tiny", ["vanilla", "80k"])
    for family in saved.FAMILIES:
        figures.draw_consistency(results / "tiny", "vanilla", "all", family, limits)
    assert [fig.axes[0].get_ylim() for _, fig in drawn] == [limits, limits]


def test_the_post_hoc_scripts_overwrite_the_figures_with_equal_bytes(results, scripts):
    figures_pca.draw_pca(results / "tiny", "80k", quiet=True)
    folder = results / "tiny/plots"
    before = {
        path: path.read_bytes()
        for path in [*folder.glob("*/pca/*_80k_*"), *folder.glob("*/pca_3d/*_80k_*")]
    }
    assert len(before) == 12
    for path in before:
        path.write_bytes(b"")
    for name in ("pca_2d_recolor", "pca_3d"):
        done = scripts[name]("--results_dir", results, "--scales", "80k")
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 6
    assert {path: path.read_bytes() for path in before} == before


def test_accuracy_chart_draws_both_charts_of_every_model(results, scripts):
    done = scripts["accuracy_chart"]("--results-dir", results)
    assert done.returncode == 0, done.stderr
    assert settings_of(results / "tiny/plots/accuracy/accuracy_trajectory.png")["scales"] == [
        "vanilla",
        "80k",
        "400k",
    ]
    assert (results / "tiny/plots/accuracy/accuracy_group_bars.pdf").exists()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--results_dir", "{}/none"], "holds no model's results"),
        (["--model", "nobody", "--results_dir", "{}"], "--model nobody"),
        (["--scales", "9z", "--results_dir", "{}"], "--scales 9z"),
        (["--scale", "80k"], "--scale"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(results, scripts, name, arguments, said):
    done = scripts[name](*[part.format(results) for part in arguments])
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and said in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("file", "content", "draw"),
    [
        (
            "json/pred_stats_a.json",
            "{",
            lambda folder: figures_scales.draw_accuracy_bars(folder, ["a"]),
        ),
        (
            "json/pred_stats_a.json",
            "[]",
            lambda folder: figures_scales.draw_accuracy_bars(folder, ["a"]),
        ),
        (
            "csv/delta_similarity_a_L0_all_pairs.csv",
            ",left\nleft,x\n",
            lambda folder: figures.draw_heatmaps(folder, "a", "all"),
        ),
        (
            "csv/delta_similarity_a_L0_all_pairs.csv",
            "",
            lambda folder: figures.draw_heatmaps(folder, "a", "all"),
        ),
        ("npz/vectors_a.npz", "PK", lambda folder: figures_pca.draw_pca(folder, "a")),
        ("json/other.json", "{}", lambda folder: figures_pca.draw_pca(folder, "a")),
        ("json/other.json", "{}", lambda folder: figures.draw_scale(folder, "a")),
        ("json/other.json", "{}", lambda folder: figures_scales.draw_merge(folder, ["a"])),
        ("json/other.json", "{}", lambda folder: figures_scales.draw_merge(folder, [])),
    ],
)
def test_a_broken_or_missing_file_is_named_in_one_line(tmp_path, file, content, draw):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(UsageError) as error:
        draw(tmp_path)
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message
    # "{}" is of a name that no command writes: the folder lacks everything and is named alone
    assert content == "{}" or "swap_analysis.py" in message


def test_vectors_that_lack_an_array_are_refused_by_its_name(tmp_path):
    arrays = planted_pairs(n=2, layers=(1,))
    del arrays["is_correct_swap_L1"]
    write_npz(tmp_path / "npz/vectors_a.npz", arrays)
    with pytest.raises(UsageError, match="is_correct_swap_L1"):
        figures_pca.draw_pca(tmp_path, "a")


def test_nothing_of_torch_is_imported_and_any_folder_will_do(results, tmp_path):
    for name in SCRIPTS:
        path = str(FOLDER / f"{name}.py")
        code = (
            f"import sys, runpy\nruns = runpy.run_path({path!r})\nassert not [m for m in"
            " sys.modules if m.split('.')[0] in ('torch', 'transformers', 'sklearn')]"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    command = [
        sys.executable,
        "-W",
        "error",
        str(FOLDER / "accuracy_chart.py"),
        "--results_dir",
        str(results),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
