"""How often is the answer right in the original order, in the swapped order and in both, and what
does more data change?

    acc_both = share of pairs with both answers right; a model that always says the same word has 0

    python swap_analysis/accuracy_chart.py --results_dir results --model tiny

Reads json/pred_stats_{scale}.json; writes plots/accuracy/accuracy_group_bars and
accuracy_trajectory as PNG and PDF, with intervals where the file has them. arXiv 2605.30161;
docs/studies/swap_analysis.md, sections 2 and 3."""

from __future__ import annotations

from collections.abc import Sequence

from vlmdiag import cli
from vlmdiag.swap import saved


def main(argv: Sequence[str] | None = None) -> int:
    args = saved.parse_args(__doc__, argv)
    folders = saved.models(args.results_dir, args.model)
    from vlmdiag.swap import figures_scales, index_page

    for folder in folders:
        scales = saved.find_scales(folder, args.scales)
        figures_scales.draw_accuracy_bars(folder, scales)
        figures_scales.draw_accuracy_trajectory(folder, scales)
        index_page.write_index(folder)
    return 0


if __name__ == "__main__":
    cli.run(main)
