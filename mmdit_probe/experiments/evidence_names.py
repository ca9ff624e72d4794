"""Names of the evidence that `select-layers` knows; no measurement, so that a command can check its options first."""

from __future__ import annotations

from mmdit_probe.errors import unknown

EVIDENCE = {
    "word_mass": "I2T mass on words, in units of what uniform attention gives",
    "value_gap": "value norm, prompt minus image tokens, relative to image tokens",
    "pca_class": "recall of a class probe on the attention output, above that with another scene's classes",
    "perturbation": "pixels read as another class when the layer's I2T is blurred, above a random change",
    "segmentation": "mIoU of the I2T maps of the classes present",
}
"""Name -> what it measures. Higher means more evidence that a layer grounds words."""

CONTROLLED = {
    "word_mass": ("random", "shuffled", "uniform"),
    "value_gap": ("random", "shuffled", "uniform"),
    "pca_class": ("random", "shuffled", "uniform"),
    "perturbation": ("random", "uniform"),
    "segmentation": ("random", "uniform"),
}
"""Controls of `experiments.controls` that make sense for each: where the text asks for the image's own classes, or
nothing reads it, another item's caption does not."""

RANK_RULES = ("ranks", "median-ranks")
WEIGHT_RULES = ("equal", "ranks")


def evidence_names(asked: str | None, from_runs: bool) -> list[str]:
    """The evidence that an option means: all of it, some by name, or (with run folders given instead) none."""
    if asked is None:
        return [] if from_runs else list(EVIDENCE)
    if asked.strip() == "all":
        return list(EVIDENCE)
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in EVIDENCE:
            raise unknown("evidence", name, EVIDENCE)
    return names
