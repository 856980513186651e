"""The figures of a report: of each experiment's runs, drawn by the diagnosis's own room, with a
caption that says what is measured and how to read it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.report.catalog import experiment_of
from vlmdiag.runs import rundirs, selection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlmdiag.interp.summary import Effects
    from vlmdiag.runs.rundirs import Run

Runs = Sequence["Run"]


class Experiment(NamedTuple):
    """What an experiment asks."""

    title: str
    question: str
    paper: str


class Drawn(NamedTuple):
    """A figure, or the PNG of one: what it measures, and how to read it."""

    name: str
    title: str
    figure: Figure | Path
    what: str
    how: str


EXPERIMENTS = {
    rundirs.COCO: Experiment(
        "Balance of attention, lengths, positions",
        "How much does the answer attend to the picture, how long are its tokens, and does it"
        " matter where they stand?",
        "Beyond Semantics, arXiv 2503.17349",
    ),
    "psi": Experiment(
        "Order of vision tokens",
        "Does the answer need to know where in the picture a token was?",
        "Beyond Semantics, arXiv 2503.17349, table 2",
    ),
    "evaluate_relevancy": Experiment(
        "Faithfulness of relevancy maps",
        "Which map over the picture shows what the answer depends on?",
        "LVLM-Stethoscope; arXiv 2103.15679",
    ),
    "hallucination_warning": Experiment(
        "Hallucinated words",
        "Do the model's own signals tell which words of an answer are not in the picture?",
        "LVLM-Stethoscope",
    ),
    "swap_analysis": Experiment(
        "Axes of space",
        "When a question is turned round, does the hidden state move along one axis for left and"
        " right, above and below, near and far?",
        "Why Far Looks Up, arXiv 2605.30161",
    ),
    "spatial_tunnel": Experiment(
        "Spatial tunnel",
        "Is what stands higher in the picture taken for farther away?",
        "Why Far Looks Up, arXiv 2605.30161",
    ),
    "volcano": Experiment(
        "Answer, criticism, revision",
        "Does the model look at the picture more while it criticises and revises its answer?",
        "Volcano, arXiv 2311.07362",
    ),
    "lens_accuracy": Experiment(
        "Logit lens",
        "In which layers do the tokens on an object decode to its name?",
        "llava-interp, arXiv 2410.07149, section 5",
    ),
    "ablation": Experiment(
        "Token ablation: descriptions",
        "Which vision tokens does naming an object need?",
        "llava-interp, arXiv 2410.07149, table 1",
    ),
    "ablation_vqa": Experiment(
        "Token ablation: questions",
        "Which vision tokens does the answer to a question need?",
        "llava-interp, arXiv 2410.07149, table 1",
    ),
    "knockout": Experiment(
        "Attention knockout",
        "Through which layers does what is on an object reach the answer?",
        "llava-interp, arXiv 2410.07149, table 2",
    ),
    "logit_lens": Experiment(
        "Logit lens pages", "What does every position decode to, layer by layer?", "llava-interp"
    ),
    "relevancy": Experiment(
        "Relevancy maps", "Where in the picture is what a word depends on?", "LVLM-Stethoscope"
    ),
    "mean_vector": Experiment(
        "Mean vision vector", "What do vision tokens look like on average?", "llava-interp"
    ),
}
OTHER = Experiment("Other", "An experiment of your own.", "")


def experiment(run: Run) -> Experiment:
    return EXPERIMENTS.get(experiment_of(run), OTHER)


def figures_of(runs: Runs) -> Iterator[Drawn | str]:
    """The figures of all runs of one experiment; a line for what cannot be drawn. A run that lacks
    what a figure needs is left out of it."""
    for draw in DRAWERS.get(experiment_of(runs[0]), ()):
        try:
            yield from list(draw(runs))
        except UsageError as error:
            reasons = [_refused(draw, run) for run in runs]
            able = [run for run, reason in zip(runs, reasons, strict=True) if reason is None]
            if len(able) in (0, len(runs)):  # each for itself, or only together
                yield str(error)
                continue
            yield from filter(None, reasons)
            yield from _of_able(draw, able)


def _of_able(draw: Callable[[Runs], Iterator[Drawn]], runs: Runs) -> Iterator[Drawn | str]:
    """The figures of runs of which each can be drawn alone."""
    try:
        yield from list(draw(runs))
    except UsageError as error:
        yield str(error)


def _refused(draw: Callable[[Runs], Iterator[Drawn]], run: Run) -> str | None:
    """Why a figure of a run alone cannot be drawn."""
    from matplotlib import pyplot as plt

    before = set(plt.get_fignums())
    try:
        list(draw([run]))
    except UsageError as error:
        return str(error)
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)
    return None


def _labels(runs: Runs) -> dict[str, Run]:
    return dict(zip(selection.run_labels(list(runs)), runs, strict=True))


def _by_system_prompt(runs: Runs) -> Iterator[tuple[str, dict[str, Run]]]:
    """Runs with the system prompt, and those without: they are not compared with each other."""
    without = [run for run in runs if run.path.name.endswith("__sp-1")]
    with_prompt = [run for run in runs if run not in without]
    for ending, some in (("", with_prompt), ("_sp1", without)):
        if some:
            yield ending, _labels(some)


BANDS = "Bands are 95 % intervals over pictures; n is in the legend."

# --- Beyond Semantics -----------------------------------------------------------------------------


def _balance(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.beyond_semantics import cmb_figures

    for ending, labels in _by_system_prompt(runs):
        measured = {
            label: cmb_figures.read_maps(run, "head_vision_share") for label, run in labels.items()
        }
        balances = [
            cmb_figures.balance_of(labels[label], label, ids, maps, ids)
            for label, (ids, maps) in measured.items()
        ]
        yield Drawn(
            f"cmb{ending}",
            "Cross-modality balance" + (" without the system prompt" if ending else ""),
            cmb_figures.panel_figure(balances, "fixed"),
            "Of a head's attention on the picture and on the user's text, the picture's part, mean"
            " over the answer's tokens and over pictures.",
            "A head that spread its attention evenly over tokens would be at chance, which is near"
            " 1 because a picture has many tokens: look for heads and layers below it, which read"
            " the text, and above it, which look. " + BANDS,
        )


def _shares(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.beyond_semantics import share_figures

    for label, run in _labels(runs).items():
        shares = share_figures.read_shares(run)
        yield Drawn(
            f"shares_{run.path.name}",
            f"Shares of attention by layer: {label}",
            share_figures.layers_figure(
                shares.layers,
                {group: plots.color_of(group) for group in share_figures.GROUPS},
                f"Attention shares by layer: {label}",
                "share of attention to\nsystem prompt, image and user text",
            ),
            "How the attention of the answer's tokens parts into system prompt, picture and user"
            " text, mean over heads; the first token is left out.",
            "The three lines add up to 1. " + BANDS,
        )


def _norms(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.beyond_semantics import norm_figures

    for ending, labels in _by_system_prompt(runs):
        measured = {label: norm_figures.read_norms(run) for label, run in labels.items()}
        curves = {
            label: norm_figures.curves_of(norms, norms.ids) for label, norms in measured.items()
        }
        kinds = {run.meta["settings"].get("hidden_norm_kind") or "l2" for run in labels.values()}
        yield Drawn(
            f"hidden_norms{ending}",
            "Lengths in the residual stream",
            norm_figures.average_figure(
                curves, plots.model_colors(list(curves)), "/".join(sorted(kinds)), 6, logy=True
            ),
            "Mean length of a token's hidden state, of user text and of the picture, and their"
            " ratio, at the input of the decoder (0) and after each layer, before the final norm.",
            "A ratio of 0 on the log scale is equal length. Vision tokens that enter far longer"
            " are hardly moved by the first layers. " + BANDS,
        )


def _rope(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.beyond_semantics import rope_figures

    for ending, labels in _by_system_prompt(runs):
        probes = {label: rope_figures.read_probe(run, None) for label, run in labels.items()}
        step = rope_figures.common_step([probe.step for probe in probes.values()])
        curves = {label: rope_figures.curves_of(probe) for label, probe in probes.items()}
        yield Drawn(
            f"rope{ending}",
            "Sensitivity to position",
            rope_figures.layers_figure(curves, list(rope_figures.DRAWN), step),
            "All vision keys are moved by one position towards the query, in each layer for itself:"
            " how much the logits of attention to the picture change, and its share.",
            "Higher is more sensitive to where the picture stands in the prompt. " + BANDS,
        )


def _psi(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.beyond_semantics import psi_report

    labels = _labels(runs)
    of_runs = {label: psi_report.summaries_of(run) for label, run in labels.items()}
    if len(labels) > 1:
        yield Drawn(
            "psi",
            "Position sensitivity index of the models",
            psi_report.draw_comparison(of_runs),
            "The share of right answers that is lost when the vision tokens are shuffled, by kind"
            " of question.",
            "0: the picture is a bag of features. Where intervals of two models overlap, do not"
            " read an order into them.",
        )
    for label, run in labels.items():
        summaries = of_runs[label]
        yield Drawn(
            f"psi_{run.path.name}",
            f"Position sensitivity index: {label}",
            psi_report.draw(label, run.meta["settings"]["num_permutations"], summaries),
            "Right answers with the vision tokens in order and shuffled; PSI is the share of right"
            " answers that the shuffle loses.",
            "PSI 0: the picture is a bag of features; 1: every right answer needed the order. A"
            " question with two answers can lose at most about half. Whiskers are 95 % intervals"
            " over pictures.",
        )


# --- relevancy ------------------------------------------------------------------------------------


def _relevancy(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.relevancy import evaluation_figures
    from vlmdiag.relevancy.evaluation_tables import Evaluation, count_of

    for label, run in _labels(runs).items():
        evaluation = Evaluation(run)
        chosen = evaluation.tokens("all", 1.0)
        title = f"{count_of(chosen)} tokens"
        yield Drawn(
            f"relevancy_areas_{run.path.name}",
            f"Areas under perturbation curves: {label}",
            evaluation_figures.areas_figure(evaluation, label, chosen, title),
            "Vision tokens are removed in the order of each map, most relevant first (positive) or"
            " last (negative); the area is the mean of the word's probability that is left. Gap:"
            " negative minus positive.",
            "A good map has a low positive and a high negative area. The last panel is what"
            " counts: the gap over that of a random order, 0 where a map says nothing.",
        )
        if all(evaluation.local):
            yield Drawn(
                f"relevancy_local_{run.path.name}",
                f"On the object or not: {label}",
                evaluation_figures.local_figure(evaluation, label, chosen, title),
                "How often the highest part of a map lies on the object that the word names, and"
                " how much of the map does.",
                "The lines are what guessing by the object's size or by the middle of the picture"
                " would give.",
            )


def _hallucination(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.stethoscope.calibration_figure import draw

    for label, run in _labels(runs).items():
        path = run.path / "analysis" / "report.json"
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read; run hallucination_warning.py test") from error
        for kind, numbers in content.items():
            if not isinstance(numbers, dict) or "signals" not in numbers or numbers["too_few"]:
                continue
            yield Drawn(
                f"hallucination_{kind}_{run.path.name}",
                f"Signals of hallucinated words, {kind}: {label}",
                draw(numbers, kind, label),
                "How well each signal ranks hallucinated words above others (AUROC), and whether"
                " the fitted probability is right as often as it says.",
                "0.5 is chance. Points on the diagonal are calibrated.",
            )


# --- swap analysis --------------------------------------------------------------------------------

SWAP_KINDS = {  # of its summary, and how each is read
    "accuracy_group_bars": "Chance is 0.5 for one order and 0.25 for both. Whiskers: 95 %.",
    "accuracy_strata": "No gap: depth is not read off height. Whiskers: 95 % over pictures.",
    "sign_corrected": "Above the grey band of shuffled labels there is an axis.",
    "cross_alignment": "Above or below the band of the null, height and depth share a direction.",
    "vd_ei": "Compare strata before models: part of it comes from the questions' wording.",
    "strata": "Lines that differ between strata come from the pictures, not from the wording.",
}


def swap_figures(folder: Path, name: str) -> Iterator[Drawn | str]:
    """The summary that swap_analysis.py drew into a results folder."""
    from vlmdiag.swap import index_page, saved

    files = [
        path.stem.removeprefix("pred_stats_") for path in folder.glob("json/pred_stats_*.json")
    ]
    entries = [
        (index_page.entry_of(path, folder, sorted(files, key=saved.by_samples)), path)
        for path in sorted((folder / "plots").rglob("*.png"))
    ]
    found = False
    for kind, how in SWAP_KINDS.items():
        for entry, path in entries:
            if entry.kind == kind and entry.group in ("accuracy", "all"):
                found = True
                words = kind.replace("_", " ").replace("vd ei", "entanglement")
                yield Drawn(
                    f"swap_{name}_{entry.name}",
                    f"{words[0].upper()}{words[1:]}: {name}, {entry.section.lower()}",
                    path,
                    index_page.SENTENCES[kind],
                    how,
                )
    if not found:
        yield f"{folder} has no figures; run swap_analysis.py --stage plots"


def _tunnel(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.swap import figures_tunnel

    summaries = {label: figures_tunnel.read_summary(run) for label, run in _labels(runs).items()}
    yield Drawn(
        "spatial_tunnel",
        "Spatial tunnel",
        figures_tunnel.draw_bars(summaries, plots.model_colors(list(summaries))),
        "In drawn tunnels two objects differ in depth and in height: how often the model takes the"
        " farther one for the farther one.",
        "A model that goes by height is right where the farther one is higher, and wrong where it"
        " is lower.",
    )


# --- Volcano --------------------------------------------------------------------------------------


def _volcano(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.volcano import figures, stages

    for label, run in _labels(runs).items():
        records, _ = stages.select(run, "all")
        comparisons, maps = stages.measure(run, records, "top_k_mean", 200, 0)
        summaries = {
            stage: stages.summarise(comparison, records, stage)
            for stage, comparison in comparisons.items()
            if comparison.ids
        }
        if not summaries:
            raise UsageError(f"{run.path}: no instance has a text to compare with its first answer")
        stages.correct(summaries)
        yield Drawn(
            f"volcano_{run.path.name}",
            f"Attention to the picture by stage: {label}",
            figures.draw_ratios(label, summaries, "all", "top_k_mean"),
            "Attention to the picture while the model writes its feedback and its revision, over"
            " that while it wrote its first answer.",
            "1 is as much. The published statistic grows with the length of a text: its grey null"
            " (tokens of both texts exchanged) shows by how much. Texts cut to equal length are"
            " fair.",
        )
        grid = stages.grid_of([records[id] for id in maps.ids])
        if grid is not None:
            yield Drawn(
                f"volcano_maps_{run.path.name}",
                f"Where it looked: {label}",
                figures.draw_stage_maps(
                    label, stages.mean_maps(maps, records, grid), len(maps.ids), "all", "top_k_mean"
                ),
                "Attention to each patch of the picture in the three stages, mean over pictures.",
                "One colour scale a row, so the three stages can be compared.",
            )


# --- llava-interp ---------------------------------------------------------------------------------


def _lens(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.interp.figures import draw_lens_accuracy
    from vlmdiag.interp.lens_curves import curves_of

    for label, run in _labels(runs).items():
        yield Drawn(
            f"lens_{run.path.name}",
            f"Logit lens on objects: {label}",
            draw_lens_accuracy(label, *curves_of(run, 0)),
            "Share of the tokens on an object whose hidden state, through final norm and LM head,"
            " has the object's name as its likeliest word.",
            "Compare with another picture's name (orange) and with the other patches (grey). The"
            " best layer of each picture, as published, is chosen after looking; the dashed line is"
            " not.",
        )


def _interventions(runs: Runs) -> dict[str, tuple[Run, dict[str, Effects]]]:
    from vlmdiag.interp import summary

    found = {}
    for label, run in _labels(runs).items():
        _, records = summary.read_interventions(run.path)
        found[label] = (
            run,
            {
                setting: summary.summarise(records, setting)
                for setting in summary.SETTINGS[experiment_of(run)]
            },
        )
    return found


def _ablation(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.interp import figures

    effects = {label: by_setting for label, (_, by_setting) in _interventions(runs).items()}
    name = experiment_of(runs[0])
    yield Drawn(
        name,
        "Answers destroyed by replacing vision tokens",
        figures.draw_ablation(effects),
        "Chosen vision tokens are replaced by the mean one: share of the answers, right before,"
        " that become wrong.",
        "An object's tokens should destroy far more than as many random ones. Whiskers are exact"
        " 95 % intervals over pictures.",
    )
    if figures.has_counts(effects):
        yield Drawn(
            f"{name}_by_tokens",
            "The same by number of tokens",
            figures.draw_counts(effects),
            "The tokens that the answer's gradient finds most important, against random ones.",
            BANDS,
        )


def _knockout(runs: Runs) -> Iterator[Drawn]:
    from vlmdiag.interp import figures

    found = _interventions(runs)
    yield Drawn(
        "knockout",
        "Answers that survive cut attention",
        figures.draw_knockout(
            {label: by_setting["vqa"] for label, (_, by_setting) in found.items()},
            {label: run.meta["settings"]["windows"] for label, (run, _) in found.items()},
        ),
        "In a window of layers, the tokens named right of the arrow cannot look at those left of"
        " it: share of the right answers that stay right.",
        "1 is no effect. Where object to last token is low, the answer is read from the object in"
        " these layers.",
    )


DRAWERS: Mapping[str, tuple[Callable[[Runs], Iterator[Drawn]], ...]] = {
    rundirs.COCO: (_balance, _shares, _norms, _rope),
    "psi": (_psi,),
    "evaluate_relevancy": (_relevancy,),
    "hallucination_warning": (_hallucination,),
    "spatial_tunnel": (_tunnel,),
    "volcano": (_volcano,),
    "lens_accuracy": (_lens,),
    "ablation": (_ablation,),
    "ablation_vqa": (_ablation,),
    "knockout": (_knockout,),
}
