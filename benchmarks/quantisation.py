"""What storing a transformer in fewer bits changes in its masses: runs of `attention-budget`, compared.

    python benchmarks/quantisation.py                       # benchmarks/results/quantisation.{json,md}
    python benchmarks/quantisation.py --model "full width" --way int8 --limit 4 --no-write

Models: blocks of SD3-medium's width (1536, 24 heads x 64) with random weights and few layers, the same with queries and
keys three times as large, since those of random weights look almost evenly at all keys, and the embedded model, which
is trained and small. All of them read their text and their pictures by the embedded model's encoders, so that a run is
that of any pipeline folder: `load(folder, quantize=...)`, then `attention-budget`, then `compare` with the run in
float32 on the same prompts and seeds. bfloat16 stands beside them for scale. A package that is not there, or that
diffusers does not use on this machine, is named with its reason; nf4 is then put in place by bitsandbytes itself. A
stopped run goes on by the same call; rows of a model whose weights are others now are measured again.

The site's page "Real models" shows the result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import overhead

from mmdit_probe.errors import at_least, run_script

STEM = overhead.RESULTS / "quantisation"
WIDTH = {"num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536, "qk_norm": None}
"""What blocks of SD3-medium have in place of the embedded model's."""
SHARPER = 3.0
MODELS = ("full width", "full width, sharper", "embedded")
WAYS = {
    "bfloat16": ("torch", {"dtype": "bfloat16"}),
    "int8": ("torchao", {"quantize": "int8"}),
    "fp8": ("torchao", {"quantize": "fp8"}),
    "nf4": ("bitsandbytes", {"quantize": "nf4"}),
    "gguf Q8_0": ("gguf", {"quantize": "gguf:{folder}/Q8_0.gguf"}),
    "gguf Q4_0": ("gguf", {"quantize": "gguf:{folder}/Q4_0.gguf"}),
}
"""Way of storing -> the package that does it, and what `load` is told."""


def made(model: str, folder: Path, layers: int) -> Path:
    """The pipeline folder of a model."""
    import torch

    from mmdit_probe.models.load import load, random_twin

    pipeline = load("scenes-sd3", device="cpu").pipeline
    if model != "embedded":
        wide = pipeline.transformer
        wide.register_to_config(**WIDTH, num_layers=layers)
        wide = random_twin(wide, seed=0)
        if model.endswith("sharper"):
            with torch.no_grad():
                for name, weight in wide.named_parameters():
                    if any(part in name for part in ("to_q.", "to_k.", "add_q_proj.", "add_k_proj.")):
                        weight *= SHARPER
        pipeline.register_modules(transformer=wide)
    pipeline.save_pretrained(folder)
    return folder


def write_gguf(folder: Path, kind: str) -> None:
    """The folder's transformer as a GGUF file: weights of linear layers in `kind`, all else in float32."""
    import gguf
    from torch import nn

    from mmdit_probe.models.load import load

    transformer = load(folder, device="cpu").transformer
    linear = {f"{name}.weight" for name, of in transformer.named_modules() if isinstance(of, nn.Linear)}
    packed = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(folder / f"{kind}.gguf", "sd3")
    for name, value in transformer.state_dict().items():
        array = value.float().numpy()
        if name in linear and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, packed), raw_dtype=packed)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded(folder: Path, way: str) -> tuple[Any, str]:
    """The model, and a remark where it was not loaded in the way of a user."""
    from mmdit_probe.errors import RunError
    from mmdit_probe.models.load import load
    from mmdit_probe.models.mmdit import MMDiT
    from tests.observe.quantised import STORAGES

    options = {name: value.format(folder=folder) for name, value in WAYS[way][1].items()}
    if way.startswith("gguf") and not (folder / f"{way.split()[1]}.gguf").exists():
        write_gguf(folder, way.split()[1])
    try:
        return load(folder, device="cpu", **options), ""
    except RunError as error:
        if way != "nf4":
            raise
        pipeline = load(folder, device="cpu").pipeline
        STORAGES["bitsandbytes nf4"][1](pipeline.transformer)
        return MMDiT(pipeline, f"{folder}+nf4"), str(error).partition(": ")[2]


def measured(folder: Path, model: str, way: str, plain: Any, ask: Any) -> dict[str, Any]:
    """A row: what `compare` says of the masses of a way of storing and of float32, the largest change of any, and the
    weights in float32."""
    from mmdit_probe.experiments.compare_runs import compare_runs

    target, remark = loaded(folder, way)
    bits = sum(of.untyped_storage().nbytes() for of in stored(target.transformer))
    found = ask.run(target, progress=False)
    table = compare_runs(plain, found).table.assign(apart=lambda of: of["difference"].abs())
    keys = ["item", "step", "branch", "layer", "head", "query", "key", "span", "stream"]
    both = plain.table.merge(found.table, on=keys, suffixes=("", "_stored"), validate="one_to_one")
    if len(both) != len(plain.table):
        raise SystemExit(f"{way}: the runs have other rows")
    row: dict[str, Any] = {
        "model": model, "way": way, "mib": bits / 2**20, "n": int(table["n"].max()), "remark": remark,
        "weights": plain.request["weight_hash"],
    }  # fmt: skip
    for measure, part in table.groupby("measure"):
        most = part.loc[part["apart"].idxmax()]
        row[str(measure)] = {
            "layer": int(most["layer"]), "first": most["first"], "difference": most["difference"],
            "low": most["low"], "high": most["high"], "layers": len(part),
            "differ": int((part["p_holm"] <= 0.05).sum()),
        }  # fmt: skip
    row["largest"] = float((both["mass"] - both["mass_stored"]).abs().max())
    return row


def known(rows: list[dict[str, Any]], model: str, weights: str) -> list[dict[str, Any]]:
    """The rows that stand: those of other models, and of this one those of its weights."""
    return [row for row in rows if row["model"] != model or row["weights"] == weights]


def stored(transformer: Any) -> list[Any]:
    """Tensors that hold a transformer's parameters, one by one, however they are stored."""
    found = []
    for parameter in transformer.parameters():
        names = getattr(parameter.data, "__tensor_flatten__", lambda: ((), None))()[0]
        found += [getattr(parameter.data, name) for name in names] or [parameter.data]
        state = getattr(parameter, "quant_state", None)  # bitsandbytes keeps the scales beside
        found += [] if state is None else [state.absmax]
    return found


def packages() -> str:
    found = []
    for name in ("torch", "diffusers", "torchao", "bitsandbytes", "gguf"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def markdown(report: dict[str, Any]) -> str:
    lines = ["| model | stored as | MiB | I2T of float32 where it changes most |"
             " largest change of I2T over layers [95 %] | of I2T_word |"
             " layers that differ (I2T, words) | largest change of any head's mass |",
             "|-|-|-:|-:|-:|-:|-:|-:|"]  # fmt: skip
    remarks = {}
    for row in report["rows"]:
        cells = [row["model"], row["way"], f"{row['mib']:.0f}", f"{row['I2T']['first']:.4f}"]
        for of in (row["I2T"], row["I2T_word"]):
            cells.append(f"{of['difference']:+.5f} [{of['low']:+.5f}, {of['high']:+.5f}]")
        cells.append(", ".join(f"{row[name]['differ']} of {row[name]['layers']}" for name in ("I2T", "I2T_word")))
        lines.append(f"| {' | '.join([*cells, format(row['largest'], '.4f')])} |")
        if row["remark"]:
            remarks[row["way"]] = row["remark"]
    lines += ["", f"Made by `python benchmarks/quantisation.py` on a CPU: {report['packages']}; {report['setting']}."]
    for way, remark in remarks.items():
        lines.append(f"Through diffusers, {way} cannot run there ({remark}): bitsandbytes stored it in place.")
    lines += [f"Not measured: {way} ({reason})." for way, reason in report["left out"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--way", choices=WAYS, action="append", help="default: all")
    parser.add_argument("--layers", type=at_least(1), default=2, help="of the models of full width")
    parser.add_argument("--limit", "-n", type=at_least(1), default=8)
    parser.add_argument("--num-steps", type=at_least(1), default=2, help="sampling steps")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    from mmdit_probe.errors import RunError, first_line
    from mmdit_probe.experiments import AttentionBudget
    from mmdit_probe.models.load import load
    from tests.observe.quantised import missing

    ask = AttentionBudget(prompts="scenes:val", limit=options.limit, num_steps=options.num_steps)
    ways = {way: WAYS[way][0] for way in options.way or WAYS}
    lacking = {way: f"{package} is not installed" for way, package in ways.items() if missing(package)}
    setting = f"{options.limit} prompts, {options.num_steps} steps, {options.layers} layers of full width"
    report = overhead.kept(STEM, {"packages": packages(), "setting": setting})
    report["left out"] = report.get("left out", {}) | lacking
    for model in options.model or MODELS:
        with tempfile.TemporaryDirectory() as place:
            folder = made(model, Path(place) / "model", options.layers)
            in_float32 = load(folder, device="cpu")
            report["rows"] = known(report["rows"], model, in_float32.weight_hash)
            there = [row["way"] for row in report["rows"] if row["model"] == model]
            left = [way for way in ways if way not in (*lacking, *there)]
            if not left:
                continue
            plain = ask.run(in_float32, progress=False)
            for way in left:
                try:
                    report["rows"].append(measured(folder, model, way, plain, ask))
                    report["left out"].pop(f"{model}, {way}", None)
                except RunError as error:
                    report["left out"][f"{model}, {way}"] = first_line(error)
                if not options.no_write:
                    overhead.write(STEM, report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    run_script(main)
