"""Do the three spatial axes point in different directions? Draws the first three principal
components of the swap deltas.

    delta = state(swapped question) - state(original question), last prompt token, at each saved
    layer

    python swap_analysis/pca_3d.py --results_dir results --model tiny

Reads npz/vectors_{scale}.npz and json/category_validity_{scale}.json; writes
plots/{all,both_correct,all_with_validity}/pca_3d/pca_{scale}_L{n} as PNG and PDF. A diamond is a
category's mean, a line joins the two of a group: lines at right angles are independent axes, one
line along another is an entangled pair. arXiv 2605.30161;
docs/studies/swap_analysis.md, sections 2 and 3.4."""

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
            figures_pca.draw_pca(folder, scale, kinds=("pca_3d",))
        index_page.write_index(folder)
    return 0


if __name__ == "__main__":
    cli.run(main)
