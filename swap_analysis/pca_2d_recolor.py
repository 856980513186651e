"""In which directions do the states and their swap deltas spread? Redraws the 2-D PCA figures with
the shared palette.

    delta = state(swapped question) - state(original question), last prompt token, at each saved
    layer

    python swap_analysis/pca_2d_recolor.py --results_dir results --model tiny

Reads npz/vectors_{scale}.npz and json/category_validity_{scale}.json; writes
plots/{all,both_correct,all_with_validity}/pca/pca_{scale}_L{n} as PNG and PDF, by full SVD, each
component turned so that left, above or far points to its positive side. arXiv 2605.30161;
docs/studies/swap_analysis.md, sections 2 and 3.4. On the tiny model the two categories of a group
lie on opposite sides of zero."""

from __future__ import annotations

from collections.abc import Sequence

from vlmdiag import cli
from vlmdiag.swap import saved


def main(argv: Sequence[str] | None = None) -> int:
    args = saved.parse_args(__doc__, argv)
    folders = saved.models(args.results_dir, args.model)
    from vlmdiag.swap import figures_pca, index_page

    for folder in folders:
        for scale in saved.find_scales(folder, args.scales, "npz/vectors"):
            figures_pca.draw_pca(folder, scale, kinds=("pca",))
        index_page.write_index(folder)
    return 0


if __name__ == "__main__":
    cli.run(main)
