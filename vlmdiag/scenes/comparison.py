"""docs/smol_llava.md: what the five systems say of a published language model that learned to see,
beside the tiny model that was trained from scratch. Used by checkpoints/compare_smol_llava.py,
which runs the commands whose files are read here.

Shapes: n images, L layers, H heads, G token groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import torch

from vlmdiag.figures import plots, stats
from vlmdiag.figures.layers import LAYER_AXIS, STATE_AXIS, mean_state_name, state_name
from vlmdiag.figures.stats import Interval, interval_of
from vlmdiag.interp import summary
from vlmdiag.interp.lens_curves import best_layers, name_shares
from vlmdiag.pictures.samples import AT_HAND, Sample
from vlmdiag.runs import rundirs
from vlmdiag.scenes.scene import floor_scene, render
from vlmdiag.types import Fields
from vlmdiag.volcano.stage_statistics import STATISTICS

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.runs.rundirs import Run
    from vlmdiag.types import VLM

GROUPS = ("bos", "system", "vision", "user", "template", "generated")
STREAMS = {"vision": "vision", "user_text": "user", "sys": "system", "bos": "bos"}
WINDOWS = ("early", "early_mid", "mid", "mid_late", "late", "all")
MISSING = "not run"


Cells = dict[str, str]  # by quantity


@dataclass
class Study:
    """Where the files of one model are."""

    folder: Path  # the model's; its name is that of its run directories
    runs: Path
    out: Path  # figures and tables of the commands
    swap: Path  # results of the swap analysis on floor scenes
    before_connector: Interval | None = None  # norms of what the connector reads

    @property
    def name(self) -> str:
        return self.folder.name

    def run(self, *folders: str, experiment: str) -> Run:
        return rundirs.read_run(self.runs.joinpath(*folders), experiment)

    def coco(self, system_prompt: bool = True) -> Run | None:
        """The run with its own system prompt, or the one without; None where the model has none."""
        folder = self.runs / f"{self.name}__sp-{0 if system_prompt else 1}"
        return rundirs.read_run(folder, rundirs.COCO) if folder.is_dir() else None


# --- cells ----------------------------------------------------------------------------------------


def cell(interval: Interval, digits: int = 2) -> str:
    """'0.53 [0.41, 0.66] (n = 20)'."""
    if not np.isfinite(interval.mean):
        return "none"
    limits = ""
    if np.isfinite(interval.low):
        limits = f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    return f"{interval.mean:.{digits}f}{limits} (n = {int(interval.n)})"


def at(interval: Interval, index: int) -> Interval:
    """One cell of an interval over layers."""
    return Interval(*(array[index] for array in interval))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def side_by_side(rows: Mapping[str, Sequence[str]], studies: Sequence[Study]) -> list[str]:
    """A row for each quantity, a column for each model."""
    header = ["", *(study.name for study in studies)]
    return table(header, [[name, *cells] for name, cells in rows.items()])


# --- Beyond Semantics -----------------------------------------------------------------------------


@torch.inference_mode()
def norms_before_connector(vlm: VLM, count: int = 20) -> Interval:
    """Norms of what the connector reads, mean over the tokens of a picture; of generated scenes."""
    connector = vlm.parts.connector
    assert connector is not None
    read: list[float] = []

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        read.append(inputs[0].float().norm(dim=-1).mean().item())

    handle = connector.register_forward_pre_hook(keep)
    rng = Random("norms before the connector")
    for index in range(count):
        sample = Sample(str(index), AT_HAND, "Describe the image.")
        vlm.vision(vlm.encode([sample], [render(floor_scene(rng, 3))]))
    handle.remove()
    return stats.mean_interval(read)


def token_norms(study: Study) -> Cells:
    """Cells of the norms with which tokens enter the decoder."""
    path = study.out / "token_norms" / study.name / "token_norms_comparison.json"
    found = json.loads(path.read_text())
    cells = {}
    if study.before_connector is not None:
        cells["norm of vision tokens before the connector"] = cell(study.before_connector, 1)
    for group in ("vision", "text"):
        numbers = found[group]
        interval = Interval(*(numbers[k] for k in ("mean_over_images", "low", "high", "images")))
        cells[f"norm of {group} tokens at the decoder's input"] = cell(interval, 1)
    ratio = Interval(**found["vision_over_text"])
    cells["vision / text"] = cell(ratio, 1)
    return cells


def of_coco(run: Run, name: str) -> Float[np.ndarray, "n ..."]:
    """One array of every image."""
    return np.stack([run.arrays(id)[name].astype(float) for id in run.ids()])


def group_shares(run: Run) -> dict[str, Interval]:
    """{group: attention that it gets at each layer}, mean over heads and images."""
    mass = of_coco(run, "group_mass").mean(-1)  # (n, G, L)
    names = run.record(run.ids()[0])["groups"]
    return {name: stats.mean_interval(mass[:, names.index(name)]) for name in GROUPS}


def balance(run: Run) -> Interval:
    """CMB at each layer, mean over heads."""
    of_layers = np.nanmean(of_coco(run, "head_vision_share"), -1)
    return stats.mean_interval(of_layers, bounds=stats.SHARES)


def attention_cells(study: Study) -> Cells:
    """Cells of the balance of attention, with the system prompt and without."""
    cells: dict[str, str] = {}
    for name, run in (("with", study.coco()), ("without", study.coco(system_prompt=False))):
        if run is None:
            cells[f"CMB {name} system prompt, all layers"] = MISSING
            continue
        chance = run.record(run.ids()[0])["chance_vision_share"]
        values = np.nanmean(of_coco(run, "head_vision_share"), (1, 2))
        cells[f"CMB {name} system prompt, all layers"] = cell(stats.mean_interval(values))
        if "CMB if attention were even" not in cells:
            shares = group_shares(run)
            middle = len(shares["bos"].mean) // 2
            for group in ("bos", "system"):
                of_group = f"{cell(at(shares[group], middle))}, layer {middle}"
                cells[f"attention to {group} in the middle layer"] = of_group
            cells["CMB if attention were even"] = f"{chance:.2f}"
    return cells


def draw_attention(studies: Sequence[Study]) -> Figure:
    """Attention of every group through the layers, and CMB as a line."""
    figure, axes = plt.subplots(1, len(studies), figsize=(5.2 * len(studies), 3.4), sharey=True)
    for ax, study in zip(np.atleast_1d(axes), studies, strict=True):
        run = study.coco() or study.coco(system_prompt=False)
        assert run is not None
        shares = group_shares(run)
        layers = np.arange(len(shares["bos"].mean))
        heights = [shares[group].mean for group in GROUPS]
        colors = [plots.color_of(group) for group in GROUPS]
        ax.stackplot(layers, heights, labels=GROUPS, colors=colors, alpha=0.75, linewidth=0)
        ax.plot(layers, balance(run).mean, color="black", label="CMB = vision / (vision + text)")
        ax.set(title=f"{study.name} (n = {len(run.ids())})", xlabel=LAYER_AXIS, ylim=(0, 1))
        plots.layer_ticks(ax)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("attention of the answer's rows")
    figure.legend(*first.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def draw_streams(ax: Axes, study: Study) -> None:
    """Lengths in the residual stream by token group."""
    run = study.coco() or study.coco(system_prompt=False)
    assert run is not None
    for stream, group in STREAMS.items():
        if f"hidden_norms_{stream}" not in run.arrays(run.ids()[0]):
            continue
        norms = stats.mean_interval(of_coco(run, f"hidden_norms_{stream}"))
        if np.isfinite(norms.mean).any():
            states = np.arange(len(norms.mean))
            plots.line_with_band(ax, states, norms, group, plots.color_of(group))
    ax.set(title=study.name, xlabel=STATE_AXIS, yscale="log")


def draw_rope(ax: Axes, study: Study) -> None:
    """What moving the vision tokens by one position does to the attention logits, by layer."""
    run = study.coco() or study.coco(system_prompt=False)
    assert run is not None
    change = np.abs(of_coco(run, "delta_gv")).mean(-1)
    interval = stats.mean_interval(change)
    color = plots.color_of(study.name)
    plots.line_with_band(ax, np.arange(len(interval.mean)), interval, study.name, color)
    ax.set(title=study.name, xlabel=LAYER_AXIS)


def draw_row(studies: Sequence[Study], draw: Callable[[Axes, Study], None], ylabel: str) -> Figure:
    """One panel a model."""
    figure, axes = plt.subplots(1, len(studies), figsize=(5.2 * len(studies), 3.2))
    panels = np.atleast_1d(axes)
    for ax, study in zip(panels, studies, strict=True):
        draw(ax, study)
    panels[0].set_ylabel(ylabel)
    plots.legends(list(panels), below=False)
    return figure


def hidden_norm_cells(study: Study) -> Cells:
    """Cells of the lengths in the residual stream, in the middle of the decoder."""
    run = study.coco() or study.coco(system_prompt=False)
    assert run is not None
    cells = {}
    norms = {group: of_coco(run, f"hidden_norms_{name}") for name, group in STREAMS.items()}
    middle = norms["vision"].shape[1] // 2
    for group in ("bos", "user"):
        ratio = norms[group] / norms["vision"]
        name = "first token / vision" if group == "bos" else "question / vision"
        of_group = cell(stats.mean_interval(ratio[:, middle]))
        cells[f"{name}, in the middle"] = f"{of_group}, after layer {middle - 1}"
    peak = norms["bos"] / norms["vision"]
    where = int(peak.mean(0).argmax())
    largest = cell(stats.mean_interval(peak[:, where]), 1)
    cells["first token / vision, where it is largest"] = f"{largest}, hidden state {where}"
    return cells


# --- llava-interp ---------------------------------------------------------------------------------


def lens_run(study: Study) -> Run:
    return study.run("lens_accuracy", study.name, experiment="lens_accuracy")


def lens_cells(study: Study) -> Cells:
    """Cells of the logit lens on objects."""
    shares = name_shares(lens_run(study), seed=0)
    own, shuffled = shares["own"], shares["shuffled"]
    best = best_layers(own, seed=0)["cross_fitted"]
    late = own.shape[1] * 2 // 3
    state = late + int(own[:, late:].mean(0).argmax())

    def of(values: Float[np.ndarray, " n"]) -> str:
        return cell(stats.mean_interval(values, bounds=stats.SHARES, discrete=True))

    cells = {
        "at the input (hidden state 0)": of(own[:, 0]),
        "middle hidden state": of(own[:, own.shape[1] // 2]),
        "best of the last third": f"{of(own[:, state])}, {state_name(state)}",
        "last hidden state": of(own[:, -1]),
        "last hidden state, names of another picture": of(shuffled[:, -1]),
        "best layer, cross-fitted": f"{of(best.shares)}, {mean_state_name(best.state)}",
    }
    return cells


def draw_lens(studies: Sequence[Study]) -> Figure:
    """Share of object patches whose top-1 token is a name of the object, by depth."""
    figure, ax = plt.subplots(figsize=(6.4, 3.6))
    for study, color in zip(studies, plots.CYCLE, strict=False):
        shares = name_shares(lens_run(study), seed=0)
        own = stats.mean_interval(shares["own"], bounds=stats.SHARES, discrete=True)
        depth = np.linspace(0, 1, len(own.mean))
        plots.line_with_band(ax, depth, own, study.name, color)
        ax.plot(depth, stats.measured_mean(shares["shuffled"]), color=color, linestyle=":")
    ax.set(xlabel="depth (0: input of the decoder, 1: after its last layer)", ylim=(-0.02, 1.02))
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.set_ylabel("object's name is the top-1 token")
    plots.legends([ax], titles=["dotted: names of another picture"], below=True)
    return figure


def ablation_cells(study: Study) -> Cells:
    """Cells of token ablation: object patches, with one and two more rows around, and as many
    random tokens."""
    cells = {}
    for experiment in ("ablation", "ablation_vqa"):
        run, records = summary.read_interventions(study.runs / experiment / study.name)
        for setting in summary.SETTINGS[experiment]:
            effects = summary.summarise(records, setting)
            for around in range(3):
                effect = effects[f"patch_{around}"]
                assert effect.minus_random is not None
                name = f"{setting}: object{f' + {around}' if around else ''}"
                cells[f"{name}, answers destroyed"] = cell(effect.destroyed)
                cells[f"{name}, minus as many random tokens"] = cell(effect.minus_random)
    return cells


def knockout_cells(study: Study) -> Cells:
    """Cells of attention knockout in each window of layers: what stays right where the object, or
    everything else, is hidden from the last token."""
    _, records = summary.read_interventions(study.runs / "knockout" / study.name)
    effects = summary.summarise(records, "vqa")
    cells = {}
    for source in ("object+1", "other"):
        for window in WINDOWS:
            effect = effects[f"{source}:last_token:{window}"]
            cells[f"{source} to last token, {window.replace('_', '-')} layers"] = cell(
                effect.relative_accuracy
            )
    return cells


# --- relevancy ------------------------------------------------------------------------------------


def relevancy_cells(study: Study) -> Cells:
    """Cells of the perturbation test."""
    from vlmdiag.relevancy.evaluation_tables import Evaluation

    run = study.run("evaluate_relevancy", study.name, experiment="evaluate_relevancy")
    evaluation = Evaluation(run)
    chosen = evaluation.tokens("all", 1.0)
    values = evaluation.areas("mean", chosen, "ratio")  # (n, M, 3)
    gaps = stats.mean_interval(values[..., 2])
    return {
        method.replace("_", " "): cell(at(gaps, index))
        for index, method in enumerate(evaluation.methods)
    }


# --- swap analysis --------------------------------------------------------------------------------


def swap_rows(study: Study) -> list[list[str]]:
    """One row for each scale: accuracy, coherence of the three axes, entanglement."""
    rows = []
    for path in sorted((study.swap / "json").glob("pred_stats_*.json")):
        scale = path.stem.removeprefix("pred_stats_")
        stats_of = json.loads(path.read_text())
        coherence = _json(study, f"sign_corrected_consistency_{scale}_all_pairs")
        layer = max(int(name.split("_L")[1]) for name in coherence if "_L" in name)
        axes = [
            _limits(coherence.get(f"{group}_L{layer}"))
            for group in ("horizontal", "vertical", "distance")
        ]
        index = _json(study, f"vd_ei_{scale}").get(f"L{layer}", {}).get("eq3_raw")
        right = f"{stats_of['overall_acc_both']:.2f} (n = {stats_of['overall_n']})"
        rows.append([f"{study.name} {scale}", right, *axes, _limits(index)])
    return rows


def _json(study: Study, name: str) -> Fields:
    found: Fields = json.loads((study.swap / "json" / f"{name}.json").read_text())
    return found


def _limits(numbers: Fields | None) -> str:
    """'0.53 [0.41, 0.66]' of a number with its interval."""
    if not numbers or numbers.get("too_few"):
        return "too few"
    mean = numbers.get("mean", numbers.get("value"))
    if numbers.get("low") is None or numbers.get("high") is None:
        return f"{mean:.2f}"
    return f"{mean:.2f} [{numbers['low']:.2f}, {numbers['high']:.2f}]"


# --- Volcano --------------------------------------------------------------------------------------


def volcano_cells(study: Study) -> Cells:
    """Cells of attention to the picture in feedback and revision over that in the first answer."""
    path = study.runs / "volcano" / study.name / "analysis" / "attention_by_stage.json"
    found = json.loads(path.read_text())
    cells = {}
    for stage, comparison in found["comparisons"].items():
        for name in STATISTICS:
            ratio = comparison["statistics"][name]["ratio"]
            value = interval_of(ratio["mean"], ratio["low"], ratio["high"], comparison["images"])
            cells[f"{stage} / first answer, {name.replace('_', ' ')}"] = cell(value)
    return cells


# --- the page -------------------------------------------------------------------------------------

INTRO = """\
# A published language model that learned to see

Written by `python checkpoints/compare_smol_llava.py` from run directories; do not edit it by hand.

`tiny-llava` (2 M parameters) was trained from scratch on pictures of coloured shapes, with
some hundred words. `smol-llava-135m` has the same tower and the same 144 vision tokens before
SmolLM2-135M-Instruct, a published language model of 30 layers and 49,152 words, of which only
low-rank adapters were trained (`checkpoints/smol-llava/README.md`). What both show comes with
seeing; what only one shows comes from its language model, its depth or its training.

Means over pictures with 95 % intervals, which are bands in the figures; n counts pictures."""
CLAIMS = """\
## What the papers claim, and what is seen here

The claims of the papers, each as a quantity and the range in which it holds, fixed beforehand from
the papers' own numbers ([checkup](checkup.md#the-claims)). Intervals are over pictures and
simultaneous over the table: with few pictures they are wide, and a claim is then not decided. These
are shapes on a floor and two small models; the papers speak of photographs and of models with 7
billion parameters."""
READING = """\
## Where the two agree and where they do not

- **Sinks.** In smol-llava the first token takes a quarter of the attention in the middle layers and
  its state is more than a hundred times as long as a vision token's; tiny-llava has neither. So
  smol-llava's CMB lies far below chance where tiny-llava's lies at it. Both read the picture.
- **Lens.** In smol-llava an object's name is read where the warm start planted it, at the input,
  is gone after the first layers, and comes back in the last state alone. The control, which was
  pointed at other words, shows next to none at the input after stage 1 and yet more in the last
  state than all others: with the language model untouched, its last layer names objects whose names
  nobody planted. After stage 2, which trains the decoder to answer, little of that is left. In no
  middle or late layer but the last is a name read; the rise through the layers that the paper
  describes is seen in tiny-llava only, whose decoder was trained from scratch on these words.
- **Knockout.** Both read the answer from the object's tokens and not by way of the picture's last
  row, as the paper says. smol-llava does so in its last third, as the paper's model; tiny-llava in
  its second and third layer.
- **Relevancy.** Gradient relevancy beats a random order in both. Rollout is as good as it in
  tiny-llava and little better than random in smol-llava: thirty layers with a sink are another
  matter than six without.
- **Swapped questions.** Axes form in the course of training in both. The entanglement has opposite
  signs: it depends on the wording and on the seed, as the README of the swap analysis says.
- **Criticism.** Neither looks more at the picture while it criticises, at equal length."""
NORMS = """\
Norms with which tokens enter the decoder (Beyond Semantics, figure 1). Nothing in the training asks
for their length."""
ATTENTION = """\
Attention of the rows that write the answer, by token group, mean over heads and steps. CMB is the
picture's share of what picture and text get; the first token and the system prompt stand outside
it, so what they take is not seen in it."""
STREAMS_TEXT = """\
Lengths in the residual stream. A massive activation is a state that is far longer than all others;
it belongs to the first token, where attention goes that looks nowhere."""
ROPE = """\
What moving all vision tokens by one position does to the logits of attention, by layer (mean
absolute change over heads). High-frequency rotary pairs react to it, content does not."""
LENS = """\
Share of an object's patches whose likeliest next word, by final norm and LM head, is a name of the
object. smol-llava's warm start points patches at the words of their colour and shape among the
embeddings, so hidden state 0 shows what was planted; its control was pointed at other words. What
later layers show was asked for by nobody."""
ABLATION = """\
Object patches replaced by the mean token. Destroyed: share of right answers that become wrong;
minus the same for as many random tokens."""
KNOCKOUT = """\
Share of right answers that stay right where the last token cannot look at the object (and one row
of patches around it), or at everything else of the picture, in a window of layers."""
RELEVANCY = """\
Gap between removing the least and the most relevant vision tokens first: 0 where a map says
nothing, the higher the better."""
SWAP = """\
Floor scenes whose height and depth are correlated by 0.5. Coherence: mean cosine of the differences
of hidden states of swapped questions in the last layer, signs aligned; 0 where there is no axis.
Entanglement: equation 3 of the paper, the distance axis against the vertical one."""
VOLCANO = """\
Attention to the picture while the model criticises and revises its answer, over that in the first
answer (ratio; 1: as much). Only equal_length is fair to texts of different lengths."""


def gather(studies: Sequence[Study], measure: Callable[[Study], Cells]) -> dict[str, list[str]]:
    """A row of cells for each quantity, a column for each model."""
    rows: dict[str, list[str]] = {}
    for column, study in enumerate(studies):
        for name, value in measure(study).items():
            rows.setdefault(name, [MISSING] * len(studies))[column] = value
    return rows


def claims_table(studies: Sequence[Study]) -> list[str]:
    """The verdict on each part of the papers' claims, of the models' runs."""
    from vlmdiag.report import catalog, claims
    from vlmdiag.report.page import range_text, value_text

    runs, _ = catalog.find(studies[0].runs)
    results = studies[0].swap.parent
    subjects = catalog.subjects(runs, results, [study.name for study in studies])
    found = claims.findings(subjects)
    rows = []
    for part in claims.PARTS:
        of_part = {finding.model: finding for finding in found if finding.part is part}
        if not of_part:
            continue
        cells = []
        for study in studies:
            finding = of_part[study.name]
            value = f": {value_text(finding.interval)}" if finding.interval else ""
            n = f" (n = {int(finding.interval.n)})" if finding.interval else ""
            cells.append(f"{finding.verdict}{value}{n}")
        rows.append([f"{part.claim}. {part.quantity}", range_text(part.low, part.high), *cells])
    return table(["measured", "holds where it is", *(study.name for study in studies)], rows)


def write(studies: Sequence[Study], lens: Sequence[Study], folder: Path) -> str:
    """The page. lens: the models of the logit lens; folder: where its figures go, beside it."""
    body: list[str] = []

    def section(title: str, text: str) -> None:
        body.extend(["", f"## {title}", "", text, ""])

    def numbers(measure: Callable[[Study], Cells], models: Sequence[Study] = studies) -> None:
        body.extend(side_by_side(gather(models, measure), models))

    def figure(name: str, drawn: Figure, alternative: str) -> None:
        plots.save(drawn, folder / f"smol_{name}.png", {"page": "docs/smol_llava.md"})
        body.extend(["", f"![{alternative}]({folder.name}/smol_{name}.png)"])

    section("Norms of tokens", NORMS)
    numbers(token_norms)
    section("Balance of attention and its sinks", ATTENTION)
    numbers(attention_cells)
    figure("attention", draw_attention(studies), "Attention by token group through the layers")
    section("Lengths in the residual stream", STREAMS_TEXT)
    numbers(hidden_norm_cells)
    streams = draw_row(studies, draw_streams, "L2 norm")
    figure("hidden_norms", streams, "Norms in the residual stream by token group")
    section("Rotary positions", ROPE)
    rope = draw_row(studies, draw_rope, "|change of the logit| per position")
    figure("rope", rope, "Sensitivity to the position of the picture by layer")
    section("Logit lens", LENS)
    numbers(lens_cells, lens)
    figure("lens", draw_lens(lens), "Share of object patches that decode to the object's name")
    section("Token ablation", ABLATION)
    numbers(ablation_cells)
    section("Attention knockout", KNOCKOUT)
    numbers(knockout_cells)
    section("Relevancy", RELEVANCY)
    numbers(relevancy_cells)
    section("Swapped questions", SWAP)
    header = ["scale", "right in both orders", "horizontal", "vertical", "distance", "entanglement"]
    body.extend(table(header, [row for study in studies for row in swap_rows(study)]))
    section("Critique and revision", VOLCANO)
    numbers(volcano_cells)

    head = [INTRO, "", CLAIMS, "", *claims_table(studies), "", READING]
    return "\n".join([*head, *body]) + "\n"
