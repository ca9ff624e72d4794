"""Fig. 3 and 29 of arXiv:2509.18096, re-measured: PCA of image queries, keys, values and outputs, and what it predicts.

    python figures/fig03_pca.py
    python figures/fig03_pca.py --model ... --images photos/

Writes `fig29_pca_maps` (all layers; Fig. 3 shows some of them) and `fig03_pca_scores` with its CSV (class scores where
masks exist) under `figures/out/<model>/`. Pictures are those of scenes:val unless `--images` says otherwise.
"""

from __future__ import annotations

from runs import measured, options_of, target, write

from mmdit_probe.errors import run_script
from mmdit_probe.experiments import FeaturePCA


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--images", default="scenes:val", help="folder of pictures, or scenes:train|val|test")
    options = parser.parse_args()
    result = measured(options, FeaturePCA, images=options.images)
    write(result.figure("pca_maps"), target(options, result.model_name, "fig29_pca_maps"))
    write(result.figure("pca_scores"), target(options, result.model_name, "fig03_pca_scores"), result.summary)


if __name__ == "__main__":
    run_script(main)
