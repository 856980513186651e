"""From finished interventions to the paper's two tables.

destroyed = share of the initially correct answers that an intervention makes wrong; relative
accuracy = share of them that stay right. Each picture counts once: questions and random draws of a
picture are averaged first. Intervals are 95 %: exact ones (Clopper and Pearson) with n pictures for
shares, for paired differences and changes of log-probability those of vlmdiag/figures/stats.py. The
published summary divides by all pictures, those wrong before too, and subtracts probabilities of
different tokens.

arXiv 2410.07149, tables 1 and 2; docs/studies/llava_interp.md, sections 1.9 and 5. Kept free of
torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.figures.stats import Interval
from vlmdiag.runs import rundirs
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float

    from vlmdiag.runs.rundirs import Run

SETTINGS = {"ablation": ("generative", "polling"), "ablation_vqa": ("vqa",), "knockout": ("vqa",)}
LOGPROBS = {"polling": "logprob_yes", "vqa": "logprob_first_token"}


@dataclass
class Effect:
    """What one condition does, over the pictures that were right at first."""

    tokens: float  # mean number of replaced tokens, or of hidden keys
    destroyed: Interval
    relative_accuracy: Interval
    minus_random: Interval | None  # destroyed, minus that of as many random tokens
    change_of_logprob: Interval | None


Effects = dict[str, Effect]  # by condition


def read_interventions(path: str | Path) -> tuple[Run, list[Record]]:
    """A run of one of the three experiments and its records that were right at first. UsageError
    where there is none."""
    run = rundirs.read_run(path, _experiment_of(path))
    records = [record for record in run.records() if record["eligible"]]
    if not records:
        raise UsageError(
            f"{run.path} has no item that was answered right without intervention, so nothing can"
            " be destroyed"
        )
    return run, records


def _experiment_of(path: str | Path) -> str:
    for experiment in SETTINGS:
        try:
            rundirs.read_run(path, experiment)
        except UsageError:
            continue
        return experiment
    return "ablation"


def pooled(name: str) -> str:
    """Condition without its draw: random_matched_1_2 -> random_matched_1."""
    return re.sub(r"^((?:random|blob)_matched_\d+)_\d+$", r"\1", name)


def is_count(name: str) -> bool:
    """Whether a condition is a given number of tokens, such as random_20."""
    return re.fullmatch(r"(random|gradient)_\d+", name) is not None


def per_picture(
    records: Sequence[Record],
    setting: str,
    conditions: Sequence[str],
    value: Callable[[Record, Record], float],
) -> Float[np.ndarray, " n"]:
    """Mean of value(condition's result, record) over a picture's questions and the conditions'
    draws; NaN for a picture that has none, or was not right at first in this setting."""
    of_picture: dict[str, list[float]] = {str(record["image_id"]): [] for record in records}
    for record in records:
        if not record["conditions"]["none"][setting]["correct"]:
            continue
        drawn = [record["conditions"][name] for name in conditions if name in record["conditions"]]
        if drawn:
            mean = float(np.mean([value(result, record) for result in drawn]))
            of_picture[str(record["image_id"])].append(mean)
    return np.array([np.mean(means) if means else np.nan for means in of_picture.values()])


def by_condition(records: Sequence[Record]) -> dict[str, list[str]]:
    """{condition: its draws}, in the order in which they come first."""
    drawn: dict[str, list[str]] = {}
    for record in records:
        for name in record["conditions"]:
            if name != "none" and name not in drawn.setdefault(pooled(name), []):
                drawn[pooled(name)].append(name)
    return drawn


def destroyed(
    records: Sequence[Record], setting: str, conditions: Sequence[str]
) -> Float[np.ndarray, " n"]:
    """Share of each picture's right answers that the conditions make wrong; see per_picture()."""
    return per_picture(
        records, setting, conditions, lambda result, _: 1.0 - result[setting]["correct"]
    )


def share(of_pictures: Float[np.ndarray, " n"]) -> Interval:
    """Mean of per-picture shares with the exact interval for as many pictures; draws averaged
    within a picture make it wider than it need be, never narrower."""
    known = of_pictures[~np.isnan(of_pictures)]
    return stats.proportion_interval(known.sum(), len(known))


def summarise(records: Sequence[Record], setting: str) -> Effects:
    """The effect of every condition of one run in one setting, draws of a condition together."""
    drawn = by_condition(records)
    logprob = LOGPROBS.get(setting)

    def gain(result: Record, record: Record) -> float:
        return result[setting][logprob] - record["conditions"]["none"][setting][logprob]

    effects = {}
    for name, conditions in drawn.items():
        lost = destroyed(records, setting, conditions)
        tokens = per_picture(records, setting, conditions, lambda result, _: result["tokens"])
        control = _control_of(name)
        minus_random = change = None
        if control in drawn:
            of_control = destroyed(records, setting, drawn[control])
            minus_random = stats.paired_difference(
                lost, of_control, bounds=stats.DIFFERENCES, discrete=True
            )
        if logprob:
            change = stats.mean_interval(per_picture(records, setting, conditions, gain))
        effects[name] = Effect(
            tokens=float(stats.measured_mean(tokens)),
            destroyed=share(lost),
            relative_accuracy=share(1 - lost),
            minus_random=minus_random,
            change_of_logprob=change,
        )
    return effects


def _control_of(name: str) -> str | None:
    """The random tokens that a condition is compared with, None where there are none."""
    match = re.fullmatch(r"(?:patch|gradient_matched|blob_matched)_(\d)", name)
    return f"random_matched_{match[1]}" if match else None


# --- tables ---------------------------------------------------------------------------------------

ENDINGS = ("", "_low", "_high", "_n")


def ablation_table(runs: Mapping[str, Mapping[str, Effects]]) -> list[Record]:
    """Table 1, a row for each run, setting and condition."""
    return [
        {
            "run": label,
            "setting": setting,
            "condition": name,
            "tokens": effect.tokens,
            "destroyed": effect.destroyed,
            "minus_random": effect.minus_random,
            "change_of_logprob": effect.change_of_logprob,
        }
        for label, settings in runs.items()
        for setting, effects in settings.items()
        for name, effect in effects.items()
    ]


def knockout_table(runs: Mapping[str, Effects]) -> list[Record]:
    """Table 2, a row for each run, pair and window of layers."""
    rows = []
    for label, effects in runs.items():
        for key, effect in effects.items():
            source, target, window = key.split(":", 2)
            rows.append(
                {
                    "run": label,
                    "from": source,
                    "to": target,
                    "layers": window,
                    "relative_accuracy": effect.relative_accuracy,
                    "change_of_logprob": effect.change_of_logprob,
                }
            )
    return rows


INTERVALS = {"destroyed", "minus_random", "change_of_logprob", "relative_accuracy"}


def as_csv(rows: Sequence[Fields]) -> str:
    """A table with all digits; an interval takes the columns <name>, _low, _high, _n."""
    flat = []
    for row in rows:
        cells: Record = {}
        for name, value in row.items():
            if name in INTERVALS:
                numbers: Iterable[Any] = [None] * len(ENDINGS) if value is None else value
                cells |= {f"{name}{ending}": n for ending, n in zip(ENDINGS, numbers)}
            else:
                cells[name] = value
        flat.append(cells)
    return str(pd.DataFrame(flat, dtype=object).to_csv(index=False, lineterminator="\n"))


def as_markdown(rows: Sequence[Fields]) -> str:
    """The same cells as people read them."""
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(_shown(value) for value in row.values()) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Interval):
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}] (n = {value.n})"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
