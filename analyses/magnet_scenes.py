"""What does MAGNET gain and lose? LoRAs trained in several ways on scenes-sd3, measured on the same held-out scenes.

    python analyses/magnet_scenes.py --processes 2                       # some hours on two cores: 3 seeds, 2 recipes
    python analyses/magnet_scenes.py --train-steps 4 --long-steps 6 --seeds 2 --train-limit 16 --map-limit 6 --limit 2 \
        --num-steps 3 --pilot-steps 2 --pilot-limit 1 --rates 1e-3 --validate-limit 4 \
        --workdir /tmp/quick --out /tmp/quick/out

Variants: `class` (token-level, class masks), `part` (head-level, part masks), `self` (token-level, the model's own
refined maps, no annotation), `released` (`class` with the published code's focal loss, which takes logits for
probabilities), and `control`: the same LoRA, pictures, steps and seeds with flow matching alone, so that what more
training does is not taken for what mask alignment does. Each is trained with several seeds, whose spread is in every
interval. Recipes: `ours`, and `paper`, the paper's as it stands (`MagnetOptions`' defaults), with one longer training.

What is chosen is chosen on the "val" scenes: the layer (the best of the base model), and the loss's form and rate of
our recipe by a pilot of short trainings (the highest mIoU among those whose pictures are no worse than a control's of
the same rate). Everything reported is of "test". Trainings are in `--workdir`, what was measured of each (counts per
scene, scores per picture, its log) in `measured` below `--out`, either under a hash of the weights and of the options
that decide it: a killed training continues, and what is measured is neither trained nor measured again, so more
`--seeds` add to those that are there, on a machine without the trainings too.

Writes tables, `examples.npz` (what figures/fig10_magnet.py draws), `settings.json` and `summary.md` into `--out`, those
of the paper's recipe into `paper` below it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from magnet_tables import BASE, CONTROL, PROTOCOLS, UNSUPERVISED, choose, write

from mmdit_probe import TextMaps, load, probe
from mmdit_probe.data import Data, Sample, ScenesData
from mmdit_probe.errors import at_least, run_script
from mmdit_probe.evaluate.scores import ImageCounts, assign, histogram, matched
from mmdit_probe.experiments import Score
from mmdit_probe.experiments.score import REAL, scene_prompts
from mmdit_probe.magnet import MagnetOptions, SelfLabelled, train
from mmdit_probe.magnet.config import RECIPES
from mmdit_probe.magnet.trainer import TrainResult
from mmdit_probe.magnet.validation import readouts, validate
from mmdit_probe.models.adapters import merge
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results.folder import short_hash
from mmdit_probe.scenes import CLASSES, scene
from mmdit_probe.scenes.captions import PLURALS
from mmdit_probe.segment import Reading, discover, segment
from mmdit_probe.specs import numbers

OUT = Path(__file__).parent / "results" / "magnet_scenes"
MODEL = "scenes-sd3"
VARIANTS: dict[str, dict[str, Any]] = {
    CONTROL: {"alignment": "none"}, "class": {"alignment": "token"}, "part": {"alignment": "head"},
    "self": {"alignment": "token"}, "released": {"alignment": "token", "focal": "released"},
}  # fmt: skip
DRAWN = (BASE, CONTROL, "class", "part", "self")
"""Variants that figures show."""
LONG = "class-long"
LOGS = ("training", "validation")
"""Curves of a training."""
OURS, PAPER = "ours", "paper"
COMMON: dict[str, dict[str, Any]] = {
    OURS: {"lora_streams": "joint", "max_grad_norm": 1.0, "drop_prompt": 0.1}, PAPER: RECIPES["paper"],
}  # fmt: skip
"""Recipe -> what all its trainings share; the pilot chooses the rest of ours."""
SHOWN = 6
"""Scenes whose label maps are kept for the figures; of the pictures, the first prompt of every category is."""
SEED = 10_000


@dataclass(frozen=True)
class Plan:
    """Every option that decides the numbers."""

    steps: int
    long_steps: int
    seeds: int
    batch: int
    train: int
    rates: tuple[float, ...]
    pilot_steps: int
    pilot_prompts: int
    validation: int
    maps: int
    prompts: int
    num_steps: int
    guidance: float
    precision: str
    device: str

    def model(self, lora: Path | None = None, pictures: bool = False) -> MMDiT:
        """The model with an adapter merged into it; for pictures in `precision`."""
        model = load(MODEL, device=self.device, dtype="float32", lora=lora)
        if lora is not None:
            merge(model.pipeline)
        if pictures and self.precision != "float32":
            model.pipeline.to(getattr(torch, self.precision))
        return model


@dataclass(frozen=True)
class Job:
    """A training and its measurement; the base model, which is not trained, belongs to every recipe."""

    recipe: str
    variant: str
    seed: int = 0

    @property
    def file(self) -> str:
        return BASE if self.variant == BASE else f"{self.recipe}-{self.variant}-{self.seed}"

    @property
    def drawn(self) -> bool:
        """Whether figures show its maps and pictures."""
        return self.seed == 0 and self.variant in DRAWN


@dataclass(frozen=True)
class Folders:
    """Where trainings continue, and where what is measured of them stays."""

    trainings: Path
    measured: Path

    @property
    def layer(self) -> int:
        """The layer that `choose_layer` chose."""
        return int(json.loads((self.measured / "layer.json").read_text())["layer"])


def jobs(plan: Plan, recipe: str) -> list[Job]:
    """All of a recipe, the base model first."""
    found = [Job(recipe, BASE), *(Job(recipe, name, seed) for seed in range(plan.seeds) for name in VARIANTS)]
    return [*found, Job(recipe, LONG)] if recipe == PAPER and plan.long_steps else found


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made unless it is there; complete once it has its name."""
    if not path.exists():
        temporary = path.with_name(f"unfinished-{os.getpid()}-{path.name}")
        make(temporary)
        os.replace(temporary, path)
    return path


def held_out(plan: Plan) -> list[Sample]:
    return [ScenesData("val", plan.validation)[index] for index in range(plan.validation)]


def choose_layer(plan: Plan, folders: Folders) -> None:
    """The layer whose maps name the val scenes best in the base model."""

    def make(path: Path) -> None:
        model = plan.model()
        scores = [validate(model, held_out(plan), [layer]).miou() for layer in range(len(model.layers))]
        path.write_text(json.dumps({"layer": int(np.argmax(scores)), "miou": scores}), encoding="utf-8")

    once(folders.measured / "layer.json", make)


def fit(plan: Plan, folders: Folders, name: str, data: Data, steps: int, **options: Any) -> TrainResult:
    """One training, or the one that is there."""
    chosen = MagnetOptions(
        layers=(folders.layer,), train_steps=steps, batch=plan.batch, warmup=steps // 20,
        validate_every=max(1, steps // 4), save_every=50, **options,
    )  # fmt: skip
    return train(plan.model(), data, chosen, held_out=held_out(plan), out=folders.trainings / name, resume=True)


def pictures(plan: Plan, path: Path, name: str, lora: Path | None, count: int, split: str) -> None:
    """Generated pictures of captions of held-out scenes and their scores."""
    experiment = Score(limit=count, split=split, num_steps=plan.num_steps, guidance=plan.guidance, seed=SEED)  # type: ignore[arg-type]
    table = experiment.run(plan.model(lora, pictures=True), progress=False).table
    table[table["category"] != REAL].assign(variant=name).to_parquet(path)


def pilot(plan: Plan, folders: Folders, name: str, options: dict[str, Any]) -> None:
    """A short training on class masks with one form of the loss, measured on val."""

    @cache
    def lora() -> Path:
        data = ScenesData("train", plan.train, "class", "mixed")
        return fit(plan, folders, name, data, plan.pilot_steps, **COMMON[OURS] | options).lora

    def measured(path: Path) -> None:
        found = {
            "name": name,
            **options,
            "miou": validate(plan.model(lora()), held_out(plan), [folders.layer]).miou(),
        }
        path.write_text(json.dumps(found), encoding="utf-8")

    once(folders.measured / f"{name}.json", measured)
    scores = folders.measured / f"{name}.parquet"
    once(scores, lambda path: pictures(plan, path, name, lora(), plan.pilot_prompts, "val"))


def data_of(plan: Plan, folders: Folders, variant: str) -> Data:
    """The training data of a variant: the same pictures; the same prompts but for the parts' own captions."""
    named = ScenesData("train", plan.train, "class", "mixed")
    if variant == "part":
        return ScenesData("train", plan.train, "part", "mixed")
    if variant != "self":
        return named
    settings: dict[str, Any] = {}

    def make(path: Path) -> None:
        found = SelfLabelled.make(plan.model(), named, layers=(folders.layer,))
        with path.open("wb") as file:
            np.savez_compressed(file, labels=found.labels, settings=json.dumps(found.settings))

    with np.load(once(folders.trainings / "self-labels.npz", make)) as kept:
        settings = json.loads(str(kept["settings"]))
        return SelfLabelled(named, kept["labels"], True, settings)


def variant(plan: Plan, folders: Folders, job: Job, options: dict[str, Any]) -> None:
    """Measure a variant on test; it is trained (the base model is not) if something of that is not there."""

    @cache
    def training() -> TrainResult:
        steps = plan.long_steps if job.variant == LONG else plan.steps
        found = COMMON[job.recipe] | VARIANTS["class" if job.variant == LONG else job.variant] | options
        return fit(plan, folders, job.file, data_of(plan, folders, job.variant), steps, **found, seed=job.seed)

    def lora() -> Path | None:
        return None if job.variant == BASE else training().lora

    def keep(what: str, make: Callable[[Path], None]) -> None:
        once(folders.measured / f"{job.file}{what}", make)

    if job.variant != BASE:
        keep("-training.parquet", lambda path: training().log.to_parquet(path))
        keep("-validation.parquet", lambda path: training().validation.to_parquet(path))
    keep("-counts.npz", lambda path: save_counts(plan, path, plan.model(lora()), folders.layer))
    if job.drawn:
        keep("-examples.npz", lambda path: save_examples(plan, path, lora(), folders.layer))
    keep(".parquet", lambda path: pictures(plan, path, job.variant, lora(), plan.prompts, "test"))


def save_counts(plan: Plan, path: Path, model: MMDiT, layer: int) -> None:
    """Counts per test scene of every protocol."""
    samples = [ScenesData("test", plan.maps)[index] for index in range(plan.maps)]
    found = {}
    for kind, counts in readouts(model, samples, [layer], list(PROTOCOLS)).items():
        found[PROTOCOLS[kind]] = np.stack([counts.hit, counts.truth, counts.found])
    found[UNSUPERVISED] = np.zeros((3, plan.maps, len(CLASSES)))
    for index in range(plan.maps):
        _, counts, classes = segments(model, index, layer)
        one = ImageCounts.of(matched(counts, classes)[None])
        found[UNSUPERVISED][:, index] = np.concatenate([one.hit, one.truth, one.found])
    with path.open("wb") as file:
        np.savez_compressed(file, **found)


def segments(model: MMDiT, index: int, layer: int) -> tuple[Any, Any, Any]:
    """Unsupervised segments of a test scene from the empty prompt: labels, counts, and the class matched to each."""
    item = scene("test", index)
    labels = discover(model, item.image, Reading(layers=[layer], seeds=(index,))).labels
    counts = histogram(item.classes, labels, len(CLASSES))
    return labels, counts, assign(counts)


def save_examples(plan: Plan, path: Path, lora: Path | None, layer: int) -> None:
    """What the figures show: label maps of the first test scenes, pictures of the first prompts and their word maps.

    Word maps are those of the step at sigma of about one half, of the words of the prompt that name a class.
    """
    model = plan.model(lora)
    named, unnamed = [], []
    for index in range(SHOWN):
        item = scene("test", index)
        ids = np.array([CLASSES.index(name) for name in item.class_names], np.uint8)
        reading = Reading(layers=[layer], seeds=(index,))
        named.append(ids[segment(model, item.image, item.class_names, reading).labels])
        labels, _, classes = segments(model, index, layer)
        unnamed.append(classes.astype(np.uint8)[labels])
    prompts, images, maps, words = scene_prompts(plan.prompts, split="test"), [], [], []
    model.pipeline.to(getattr(torch, plan.precision))
    step = int(np.argmin(np.abs(np.array(model.sigmas(plan.num_steps)) - 0.5)))
    for place in range(0, len(prompts), plan.prompts):
        text = prompts[place][1]
        words.append([w for w in dict.fromkeys(text.split()) if w in (*CLASSES, *PLURALS.values())])
        with probe(model, TextMaps(words=words[-1]), layers=[layer], steps=[step]) as run:
            images += model.generate(text, steps=plan.num_steps, guidance=plan.guidance, seed=SEED + place)
        maps.append(run[TextMaps].maps(layer)[0].permute(2, 0, 1).numpy())
    most = max(map(len, words))
    grid = np.zeros((len(maps), most, *maps[0].shape[1:]), np.float16)
    for row, found in zip(grid, maps, strict=True):
        row[: len(found)] = found
    with path.open("wb") as file:
        np.savez_compressed(
            file, named=np.stack(named), unnamed=np.stack(unnamed), pictures=np.stack([np.asarray(i) for i in images]),
            maps=grid, words=json.dumps(words), prompts=json.dumps([t for _, t in prompts[:: plan.prompts]]),
        )  # fmt: skip


def pilots(plan: Plan) -> dict[str, dict[str, Any]]:
    """Options of every pilot by name: the two spaces, with and without min-max, and a control, at every rate."""
    found: dict[str, dict[str, Any]] = {}
    for rate in plan.rates:
        found[f"pilot-{CONTROL}-{rate:g}"] = {"alignment": "none", "rate": rate}
        for space in ("logit", "probability"):
            for normalise in ("none", "minmax"):
                name = f"pilot-{space}-{normalise}-{rate:g}"
                found[name] = {"alignment": "token", "space": space, "normalise": normalise, "rate": rate}
    return found


def pilot_table(plan: Plan, folders: Folders) -> pd.DataFrame:
    """The pilots' scores with the choice among them."""
    rows = [json.loads((folders.measured / f"{name}.json").read_text()) for name in pilots(plan)]
    scores = {name: pd.read_parquet(folders.measured / f"{name}.parquet") for name in pilots(plan)}
    return choose(pd.DataFrame(rows), scores)


def chosen_by_pilot(plan: Plan, folders: Folders) -> pd.Series:
    table = pilot_table(plan, folders)
    return table[table["chosen"]].iloc[0]


def run(plan: Plan, folders: Folders, processes: int) -> None:
    """All jobs, as many at a time as there are processes."""
    began = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=start) as pool:
        pool.submit(choose_layer, plan, folders).result()
        print(f"layer {folders.layer}", flush=True)
        waiting: dict[Future[None], str] = {
            pool.submit(pilot, plan, folders, name, options): name for name, options in pilots(plan).items()
        }
        left = len(waiting)
        for job in jobs(plan, PAPER):
            waiting[pool.submit(variant, plan, folders, job, {})] = job.file
        while waiting:
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                name = waiting.pop(done)
                done.result()
                print(f"{name}: finished after {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
                left -= name.startswith("pilot")
                if left == 0:
                    left = -1
                    taken = chosen_by_pilot(plan, folders)
                    print(f"chosen on val: {taken['name']}", flush=True)
                    shared = {key: taken[key] for key in ("space", "normalise")} | {"rate": float(taken["rate"])}
                    for job in jobs(plan, OURS)[1:]:
                        waiting[pool.submit(variant, plan, folders, job, shared)] = job.file


def start() -> None:
    """One thread per process: the pool is the parallelism."""
    torch.set_num_threads(1)


def log_of(folders: Folders, job: Job, kind: str) -> pd.DataFrame:
    log = pd.read_parquet(folders.measured / f"{job.file}-{kind}.parquet")
    return log.assign(variant=job.variant, seed=job.seed)


def collect(plan: Plan, folders: Folders, recipe: str, out: Path) -> None:
    """The tables of a recipe's finished jobs."""
    counts, examples, frames = {}, {}, []
    for job in jobs(plan, recipe):
        with np.load(folders.measured / f"{job.file}-counts.npz") as kept:
            counts |= {(job.variant, job.seed, protocol): ImageCounts(*kept[protocol]) for protocol in kept.files}
        if job.drawn:
            with np.load(folders.measured / f"{job.file}-examples.npz") as kept:
                examples |= {f"{job.variant}/{key}": kept[key] for key in kept.files}
        frames.append(pd.read_parquet(folders.measured / f"{job.file}.parquet").assign(training_seed=job.seed))
    logs = {kind: pd.concat([log_of(folders, job, kind) for job in jobs(plan, recipe)[1:]]) for kind in LOGS}
    layer = json.loads((folders.measured / "layer.json").read_text())
    settings = asdict(plan) | {"model": MODEL, "weight_hash": plan.model().weight_hash, "layer": layer["layer"],
                               "layer_miou_val": layer["miou"], "seed": SEED, "recipe": recipe}  # fmt: skip
    pilots_of = pilot_table(plan, folders) if recipe == OURS else None
    write(out, counts, pd.concat(frames), pilots_of, logs, examples, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-steps", dest="steps", type=at_least(1), default=400)
    parser.add_argument("--long-steps", type=at_least(0), default=3000, help="of the paper's longer training; 0: none")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="trainings of every variant")
    parser.add_argument("--batch", type=at_least(1), default=8)
    parser.add_argument("--train-limit", dest="train", type=at_least(1), default=800, help="training scenes")
    parser.add_argument("--rates", default="1e-3,3e-3", help="learning rates of the pilot")
    parser.add_argument("--pilot-steps", type=at_least(1), default=100)
    parser.add_argument(
        "--pilot-limit", dest="pilot_prompts", type=at_least(1), default=8, help="val prompts per category of the pilot"
    )
    parser.add_argument(
        "--validate-limit", dest="validation", type=at_least(1), default=64, help="val scenes of a choice"
    )
    parser.add_argument("--map-limit", dest="maps", type=at_least(1), default=200, help="test scenes of the mIoU")
    parser.add_argument("--limit", "-n", dest="prompts", type=at_least(1), default=40, help="test prompts per category")
    parser.add_argument("--num-steps", type=at_least(1), default=28)
    parser.add_argument("--guidance", type=float, default=9)
    parser.add_argument("--precision", default="bfloat16", help="of generated pictures; all else is float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--processes", type=at_least(1), default=1, help="jobs at a time, one thread each")
    parser.add_argument("--workdir", type=Path, default=Path("runs") / "magnet-scenes", help="where trainings continue")
    parser.add_argument("--out", type=Path, default=OUT, help="tables")
    ask = vars(parser.parse_args())
    processes, work, out = (ask.pop(name) for name in ("processes", "workdir", "out"))
    refusal = f"--rates {ask['rates']!r}; expected learning rates by comma, such as 1e-3,3e-3"
    ask["rates"] = tuple(numbers(ask["rates"], 0, 1, refusal))
    plan = Plan(**ask)
    decisive = {key: value for key, value in asdict(plan).items() if key != "seeds"}
    known_as = short_hash(decisive | {"weights": plan.model().weight_hash})
    folders = Folders(work / known_as, out / "measured" / known_as)
    folders.trainings.mkdir(parents=True, exist_ok=True)
    folders.measured.mkdir(parents=True, exist_ok=True)
    run(plan, folders, processes)
    collect(plan, folders, OURS, out)
    collect(plan, folders, PAPER, out / PAPER)
    print(f"written: {out}")


if __name__ == "__main__":
    run_script(main)
