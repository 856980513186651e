"""Are the consistency curves of several scales comparable by eye? Redraws them with one y-range
over all scales of a model.

    range = all means, intervals and nulls of both families (axis coherence, within-category
    consistency) in all conditions, 5 % to spare

    python swap_analysis/unify_consistency_ylim.py --results_dir results --model tiny

Reads json/{sign_corrected,within_cat}_consistency_{scale}_{tag}.json; overwrites the figures of the
same names under plots/<condition>/. arXiv 2605.30161;
docs/studies/swap_analysis.md, section 0. The range comes from the scales that are drawn: with
--scales, only from those.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.swap import saved


def main(argv: Sequence[str] | None = None) -> int:
    args = saved.parse_args(__doc__, argv)
    folders = saved.models(args.results_dir, args.model)
    from vlmdiag.swap import figures, index_page

    for folder in folders:
        scales = saved.find_scales(folder, args.scales)
        ylim = figures.consistency_range(folder, scales)
        drawn = [
            figures.draw_consistency(folder, scale, condition, family, ylim)
            for scale in scales
            for condition in saved.CONDITIONS
            for family in saved.FAMILIES
        ]
        if not any(drawn):
            raise UsageError(
                f"{folder}/json has no consistency of {', '.join(scales)}; run swap_analysis.py for"
                " them"
            )
        index_page.write_index(folder)
    return 0


if __name__ == "__main__":
    cli.run(main)
