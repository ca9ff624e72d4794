"""The recipe of the embedded model, stage by stage: parser, vae, clip, t5, transformer, export.

mmdit-probe scenes train                  # everything, about three hours on two CPU cores with bfloat16 units
mmdit-probe scenes train --stage vae      # one stage; a killed stage resumes exactly
mmdit-probe scenes train --stage import   # in place of all that: go on from what ships, e.g. with a longer last phase,
mmdit-probe scenes train --stage transformer --steps 20000
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmdit_probe.assets import folder as assets_folder
from mmdit_probe.errors import UserError, unknown
from mmdit_probe.models.mmdit import MMDiT
from training.assemble import assemble, export, unpack
from training.parser import load_trained_parser, train_parser
from training.text import train_clip, train_t5
from training.transformer import (
    CURRICULUM,
    POOLS,
    AlignedTransformer,
    Phase,
    build_transformer,
    phase_at,
    train_transformer,
)
from training.vae import train_vae

STAGES: dict[str, Callable[..., None]] = {
    "parser": train_parser,
    "vae": train_vae,
    "clip": train_clip,
    "t5": train_t5,
    "transformer": train_transformer,
}
NEEDS = {"vae": ("parser",), "transformer": ("parser", "vae", "clip", "t5")}


def run_stage(
    stage: str,
    workdir: Path,
    *,
    steps: int | None = None,
    assets: Path | None = None,
    resume: bool = True,
    device: str = "auto",
) -> None:
    """Train one stage in ``workdir``, write the assets ("export"), or start from them ("import").

    Args:
        steps: in place of the recipe's. For the transformer: the length of its last phase; a longer one continues a
            finished run.
        assets: where "export" writes and "import" reads; the package's own assets by default.

    Raises:
        UserError: unknown stage, or one whose predecessors are not trained.
    """
    from mmdit_probe.models.load import pick_device

    shipped = assets or assets_folder()
    if stage == "export":
        _require(workdir, tuple(STAGES))
        export(workdir, shipped)
        return
    if stage == "import":
        unpack(shipped, workdir)
        return
    if stage not in STAGES:
        raise unknown("stage", stage, [*STAGES, "export", "import"])
    _require(workdir, NEEDS.get(stage, ()))
    arguments: dict[str, Any] = {"resume": resume, "device": str(pick_device(device))}
    if stage == "transformer":
        curriculum = (
            CURRICULUM if steps is None else (*CURRICULUM[:-1], Phase(CURRICULUM[-1].pool, steps, CURRICULUM[-1].batch))
        )
        train_transformer(workdir, curriculum=curriculum, validate=validator(workdir, curriculum), **arguments)
    else:
        STAGES[stage](workdir, **arguments | ({"steps": steps} if steps else {}))


def _require(workdir: Path, stages: tuple[str, ...]) -> None:
    missing = [name for name in stages if not (workdir / name / "progress.json").exists()]
    if missing:
        todo = f"run `mmdit-probe scenes train --stage {missing[0]}` first"
        raise UserError(f"'{workdir}' holds no trained {', '.join(missing)}: {todo}")


def validator(workdir: Path, curriculum: tuple[Phase, ...]) -> Callable[[AlignedTransformer, int], dict[str, float]]:
    """What is measured beside the text gain during training: map quality by layer, and the parser's view of samples."""
    from mmdit_probe.experiments.scenes_quality import alignment_of, held_out, word_map_scores
    from mmdit_probe.scenes.captions import describe

    parser = load_trained_parser(workdir)

    def validate(model: AlignedTransformer, step: int) -> dict[str, float]:
        stock = build_transformer()
        stock.load_state_dict(model.transformer.state_dict())
        probed = MMDiT(assemble(workdir, stock.eval()), name="training")
        how = POOLS[phase_at(step - 1, curriculum).pool]
        items = held_out(48, **how)
        numbers: dict[str, float] = {}
        for sigma in (0.5, 0.75):
            table = word_map_scores(probed, items, sigma=sigma)
            table = table[~table["min_max"]]
            means = table[table["head"] == "mean"]
            numbers |= {
                f"miou@{sigma}/layer{layer}": float(value)
                for layer, value in zip(means["layer"], means["miou"], strict=True)
            }
            numbers[f"miou@{sigma}/head"] = float(table["miou"].max())
        prompts = [describe(item, "colour") for item in items[:32]]
        scored = alignment_of(probed, parser, prompts, steps=16, guidance=4.0, size=how["size"])
        return numbers | {name: float(scored[name].mean()) for name in ("facts", "things_right", "grounds_right")}

    return validate
