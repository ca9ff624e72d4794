"""Protocols of papers by name: what each did on a data set, as far as its paper and code say.

    Evaluate(preset="seg4diff", dataset="voc20:VOCdevkit")        # options that are given beside it win

Sources: the official code of each, read or run (file and line in the comments), else the paper. What a preset cannot
reproduce stands in `differs` and is said with every run. No torch here: `--help` reads this.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """The protocol of a paper.

    Attributes:
        source: paper. methods, protocol: of `evaluate.plan`. refine, match: likewise.
        background: rule on sets that have a background class. many_to_one: segments left over join that class.
        as_word: on COCO-Object, "background" stands in the prompt and competes, and its pixels are not scored.
        sigma, fit, size: what the network is shown; None: the toolkit's default, the model's own size.
        paper_text: T5 left out, its slots zero and as many as CLIP's, as SD3's text in arXiv:2509.18096.
        differs: what is not as in the paper, for the record.
    """

    source: str
    methods: str
    protocol: str = "present"
    refine: str = "none"
    match: str = "image"
    background: str = "none"
    many_to_one: bool = False
    as_word: bool = False
    sigma: str | None = None
    fit: str | None = None
    size: str | None = None
    paper_text: bool = False
    differs: str = ""


PRESETS = {
    # seg4diff_model_ovss.py:147 (squashed to 1024), :149 (classes present), register_coco_stuff.py:286 (label 0).
    "seg4diff": Preset(
        "arXiv:2509.18096, Table 1", "seg4diff", as_word=True, sigma="0.515", fit="squash", paper_text=True,
    ),
    # train_net.py:68 assigns per pixel row; appendix A.4 describes one assignment per image (--match image).
    "seg4diff-unsup": Preset(
        "arXiv:2509.18096, Table 2", "seg4diff-unsup", match="row", sigma="0.515", fit="squash", paper_text=True,
        differs="whether Table 2 was made with the released matching by rows is not known",
    ),
    "diffseg": Preset(
        "arXiv:2308.12469", "diffseg", match="upstream", fit="crop", size="512x512",
        differs="the paper's network is a U-Net; pictures are scored at their own size, not at 512 x 512",
    ),
    # eval_diffcut.py:121 (what is left over joins the background).
    "diffcut": Preset(
        "arXiv:2406.02842", "diffcut", match="upstream", many_to_one=True, fit="crop", size="1024x1024",
        differs="labels are scored at their own size, not at 128 x 128",
    ),
    "diffsegmenter": Preset(
        "arXiv:2309.02773", "diffsegmenter", protocol="predicted", background="threshold:0.5",
        differs="the paper sweeps its threshold on the evaluated images; here it stands at 0.5",
    ),
    "iseg": Preset("arXiv:2409.03209", "iseg", protocol="predicted", background="power:2"),
    "proxyclip": Preset(
        "arXiv:2408.04883", "proxyclip", protocol="full", background="threshold:0.2",
        differs="the paper slides windows of 336 pixels; its threshold is on softmax(40 cos), here on scaled scores",
    ),
    "corrclip": Preset(
        "arXiv:2411.10086", "corrclip", protocol="full", background="threshold:0.2",
        differs="the paper slides windows of 336 pixels and takes SAM's regions; its threshold is on softmax(40 cos)",
    ),
}  # fmt: skip

PAPER_LENGTH = 77
"""CLIP's positions, and so the T5 slots of `paper_text`."""

AS_WORD = {"coco-object": "coco-object-words"}
"""Data set -> the same with its background as a word (`Preset.as_word`)."""
