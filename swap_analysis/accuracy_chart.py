"""How often is the answer right in the original order, in the swapped order and in both, and what does more data change?

    acc_both = share of pairs with both answers right; a model that always says the same word has 0

    python swap_analysis/accuracy_chart.py --results_dir results --model tiny

Reads json/pred_stats_{scale}.json; writes plots/accuracy/accuracy_group_bars and accuracy_trajectory as PNG and PDF, with intervals where the file has them.
arXiv 2605.30161; our study's sections 2 and 3."""

import figures_scales
import saved

import cli


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--results_dir", default="results", help="the --output_dir of swap_analysis.py: one folder a model")
    parser.add_argument("--model", help="folder name of one model; None: every model")
    parser.add_argument("--scales", nargs="+", help="scales to draw; None: all that were saved")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    for folder in saved.models(args.results_dir, args.model):
        scales = saved.find_scales(folder, args.scales)
        figures_scales.draw_accuracy_bars(folder, scales)
        figures_scales.draw_accuracy_trajectory(folder, scales)
    return 0


if __name__ == "__main__":
    cli.run(main)
