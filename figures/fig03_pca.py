"""Fig. 3 and 29 of arXiv:2509.18096, re-measured: PCA of image queries, keys, values and outputs, and what it predicts.

    python figures/fig03_pca.py
    python figures/fig03_pca.py --model ... --images photos/

Writes `fig29_pca_maps` (all layers; Fig. 3 shows some of them) and, where masks exist, `fig03_pca_scores` with its CSV
under `figures/out/<model>/`. Pictures are those of scenes:val unless `--images` says otherwise.
"""

from __future__ import annotations

from mmdit_probe.experiments.pca_items import summarise
from runs import model_of, options_of, run_folder, take, target, write

from mmdit_probe.plots.pca import pca_scores
from mmdit_probe.results import read_table

COMMAND = "pca"


def main() -> None:
    parser = options_of(__doc__, COMMAND)
    parser.add_argument("--images", default="scenes:val", help="folder of pictures, or scenes:train|val|test")
    options = parser.parse_args()
    folder = run_folder(options, COMMAND, ["--images", options.images])
    model = model_of(folder)
    take(folder, "pca_maps", target(options, model, "fig29_pca_maps"))
    if (folder / "pca.parquet").exists():
        summary = summarise(read_table(folder / "pca.parquet"))
        figure = pca_scores(summary, title=f"{model}: n = {summary.n.max()} held out")
        write(figure, target(options, model, "fig03_pca_scores"), summary)


if __name__ == "__main__":
    main()
