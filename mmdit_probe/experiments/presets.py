"""Protocols of papers by name: what each did on a data set, as far as its paper and code say.

    Evaluate(preset="seg4diff", dataset="voc20:VOCdevkit")        # options that are given beside it win

Sources: the official code of each, read or run (file and line in the comments), else the paper. What a preset cannot
reproduce stands in `differs` and is said with every run. No torch here: `--help` reads this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Preset:
    """The protocol of a paper.

    Attributes:
        source: paper. methods, protocol: of `evaluate.plan`. refine, match: likewise.
        background: rule on sets that have a background class. many_to_one: segments left over join that class.
        as_word: on COCO-Object, "background" stands in the prompt and competes, and its pixels are not scored.
        sigma, fit, size: what the network is shown; None: the toolkit's default, the model's own size.
        score_size: what prediction and label are brought to before they are compared; None: the label's own size.
        options: of the methods, as --set takes them.
        on_set: data set -> what is otherwise there.
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
    score_size: str | None = None
    options: tuple[str, ...] = ()
    on_set: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    paper_text: bool = False
    differs: str = ""

    def on(self, dataset: str) -> Preset:
        """The preset on a data set."""
        return replace(self, **self.on_set.get(dataset, {}))


def _of(method: str, **options: Any) -> tuple[str, ...]:
    """Options of a method as --set takes them."""
    return tuple(f"{method}.{name}={value}" for name, value in options.items())


def _windows(method: str) -> dict[str, Any]:
    """CLIP's view and the threshold on its probabilities, as both papers' configs have them by data set."""
    large, street = _of(method, side="448,336,112"), _of(method, side="448,224,112")
    sets: dict[str, dict[str, Any]] = {
        name: {"background": f"probability:{least}"}
        for name, least in (("voc21", 0.2), ("pc60", 0.15), ("coco-object", 0.25))
    }
    sets |= {"ade20k": {"options": large}, "cityscapes": {"options": street}}
    return {"protocol": "full", "background": "probability:0.2", "fit": "squash", "on_set": sets,
            "options": _of(method, side="336,336,112")}  # fmt: skip


PRESETS = {
    # seg4diff_model_ovss.py:147 (squashed to 1024), :149 (classes present), register_coco_stuff.py:286 (label 0).
    "seg4diff": Preset(
        "arXiv:2509.18096, Table 1", "seg4diff", as_word=True, sigma="0.515", fit="squash", paper_text=True,
        differs="the noise is seeded; names are whole, the released code cuts them at their first hyphen",
    ),
    # seg4diff_model_unsup.py:118 (tau), :209 (all CLIP slots), :234 (min-max over tokens).
    # train_net.py:68 assigns per pixel row; appendix A.4 describes one assignment per image (--match image).
    # Labels as its loader resizes them: config.yaml INPUT, MIN_SIZE_TEST 640, MAX_SIZE_TEST 2560.
    "seg4diff-unsup": Preset(
        "arXiv:2509.18096, Table 2", "seg4diff-unsup", match="row", sigma="0.515", fit="squash", paper_text=True,
        score_size="short:640", options=_of("seg4diff-unsup", tau=0.1, axis="token", kinds="all", streams="clip"),
        differs="whether Table 2 was made with the released matching by rows is not known; the released code cuts maps"
                " of pictures whose shorter side exceeds 640 pixels, here they are whole; on pc60 it knows the 59 names"
                " alone and drops the background's pixels, here they are a class",
    ),
    # coco_data.py:RESOLUTION; utils.py:hungarian_matching (b x 512 x 512); its t = 300 at the noise level of equal SNR.
    "diffseg": Preset(
        "arXiv:2308.12469", "diffseg", match="upstream", fit="crop", size="512x512", score_size="512x512",
        sigma="0.454", options=_of("diffseg", tau=0.9), on_set={"coco-stuff-27": {"options": _of("diffseg", tau=1.1)}},
        differs="the paper's network is a U-Net with four scales of attention, told t = 300 of a latent without noise,"
                " here noised to the level of equal signal-to-noise ratio; its thresholds are of that attention;"
                " Cityscapes has 19 classes here, 27 there; COCO is val2017 here, 2175 pictures of it there",
    ),
    # eval_diffcut.py:114 (labels and masks of 128 x 128), :121 (what is left over joins the background); t = 50.
    "diffcut": Preset(
        "arXiv:2406.02842", "diffcut", match="upstream", many_to_one=True, fit="crop", size="1024x1024",
        score_size="128x128", sigma="0.184", options=_of("diffcut", tau=0.5, alpha=10),
        differs="the paper's network is a U-Net, its alpha that of its features; labels are read at the middle of each"
                " of 128 x 128 cells, not at their corner; VOC's boundary pixels are not scored, there they are"
                " background; Cityscapes has 19 classes here, 27 there; COCO is val2017 here, there 2175 of it;"
                " ADE20K's other is ignored here, the first of 150 there, and the last is not scored; its rows"
                " with PAMR are --refine pamr",
    ),
    # ptp_stable_best.py:311 (squashed to 512), :393 (one forward per class); t = 100.
    "diffsegmenter": Preset(
        "arXiv:2309.02773", "diffsegmenter-per-class", protocol="predicted", background="threshold:0.5", sigma="0.256",
        fit="squash", size="512x512",
        differs="the paper sweeps its threshold on the evaluated images; here it stands at 0.5; its prompt is a"
                " photograph of the class, weighted, with a caption by BLIP; its classes are tagged by BLIP and CLIP;"
                " its network is a U-Net with four scales of attention; it averages over all classes",
    ),
    # ovs/arguments.py:44 (VOC), :65 (Context), :86 (COCO); util/cam.py:64 (background); t = 100.
    "iseg": Preset(
        "arXiv:2409.03209", "iseg", protocol="predicted", background="power:2", sigma="0.256", fit="squash",
        size="512x512", options=_of("iseg", ent=0.015, rounds=8),
        on_set={"pc60": {"options": _of("iseg", ent=0.002, rounds=5)},
                "coco-object": {"options": _of("iseg", ent=0.2, rounds=10), "background": "threshold:0.45"}},
        differs="the paper's prompt joins the classes with and, adds background words and weights the classes' tokens"
                " by 1.6; its classes are tagged by TagCLIP; its network is a U-Net, two scales and two heads of which"
                " are read",
    ),
    # configs/cfg_*.py (Resize, slide_crop, slide_stride, prob_thd), proxyclip_segmentor.py:forward_slide; the words of
    # the background are the first line of configs/cls_voc21.txt and cls_coco_object.txt.
    "proxyclip": Preset(
        "arXiv:2408.04883", "proxyclip", **_windows("proxyclip"),
        differs="features are the probed model's, one forward of the whole picture, unless proxyclip.source names a"
                " network (the paper's: DINO ViT-B/8); CLIP is proxyclip.clip, its text a short ensemble of templates;"
                " the background is what is below the threshold, there words of it compete too",
    ),
    "corrclip": Preset(
        "arXiv:2411.10086", "corrclip", refine="vote", **_windows("corrclip"),
        differs="regions are diffcut's, not SAM's; features are the probed model's unless corrclip.source names a"
                " network, whose last output is read, there DINO's last queries plus keys; CLIP is corrclip.clip, its"
                " text a short ensemble of templates; the background is what is below the threshold, there words of"
                " it compete too",
    ),
}  # fmt: skip

PAPER_LENGTH = 77
"""CLIP's positions, and so the T5 slots of `paper_text`."""

AS_WORD = {"coco-object": "coco-object-words"}
"""Data set -> the same with its background as a word (`Preset.as_word`)."""
