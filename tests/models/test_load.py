"""Loading: stock pipelines by name, and one line for everything that can be wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit_probe import assets
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models import names
from mmdit_probe.models.adapters import read_metadata
from mmdit_probe.models.load import load, pick_device, pick_dtype, pipeline_index, random_twin
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.names import check_device, devices
from mmdit_probe.quiet import quiet
from tests import tiny


def test_a_directory_loads_as_the_stock_pipeline(tiny_directory: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    model = load(tiny_directory, device="cpu")
    assert type(model.pipeline) is StableDiffusion3Pipeline
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    assert [layer.index for layer in model.layers] == [0, 1, 2]
    assert model.text_length == tiny.CLIP_LENGTH + tiny.T5_LENGTH
    assert model.default_size == (64, 64) and model.size_multiple == 16
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_directory)
    assert model.weight_hash == MMDiT(stock).weight_hash


def test_a_single_changed_weight_changes_the_hash(tiny_directory: Path) -> None:
    one, two = load(tiny_directory, device="cpu"), load(tiny_directory, device="cpu")
    with torch.no_grad():
        two.transformer.proj_out.bias[0] += 1e-3
    assert one.weight_hash != two.weight_hash


def test_without_t5_the_text_keeps_its_length(tiny_directory: Path) -> None:
    model = load(tiny_directory, device="cpu", t5=False)
    assert model.pipeline.text_encoder_3 is None and model.pipeline.tokenizer_3 is None
    assert model.text_length == tiny.CLIP_LENGTH + tiny.T5_LENGTH
    text = model.encode_prompt("a red ring")
    assert text.prompt_embeds.shape[1] == model.text_length
    assert text.tokens[0].kinds.count("null") == tiny.T5_LENGTH


def test_a_directory_saved_without_t5_loads(tmp_path: Path) -> None:
    model = load(tiny.build(tmp_path, "no-t5"), device="cpu")
    assert model.pipeline.text_encoder_3 is None
    assert model.max_sequence_length == 256


def test_a_random_twin_shares_all_but_the_transformer(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_directory, tmp_path / "worlds")
    (tmp_path / "worlds-random.json").write_text(json.dumps({"base": "worlds", "seed": 3}))
    monkeypatch.setattr(assets, "_ROOT", tmp_path)
    trained, twin, again = (load(name, device="cpu") for name in ("worlds", "worlds-random", "worlds-random"))
    assert twin.weight_hash == again.weight_hash != trained.weight_hash
    assert twin.transformer.config.num_layers == trained.transformer.config.num_layers
    prompt = "a red ring"
    assert torch.equal(twin.encode_prompt(prompt).prompt_embeds, trained.encode_prompt(prompt).prompt_embeds)
    assert all(parameter.any() for parameter in twin.transformer.parameters())
    with pytest.raises(UserError, match="did you mean 'worlds'"):
        load("world")


def test_building_a_twin_leaves_the_random_state_alone_and_says_nothing(
    pipe: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    random_twin(pipe.transformer, 0)
    assert torch.equal(torch.rand(1), expected) and caplog.records == []


def test_bad_names_and_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown model"):
        load("no-such-model")
    with pytest.raises(UserError, match="model_index"):
        load(tmp_path)
    with pytest.raises(UserError, match="hub cannot be reached"):
        load("nobody/nothing")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]})
    )
    with pytest.raises(UserError, match=r"unet.*not a known MM-DiT.*SD3Transformer2DModel"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        load(tmp_path)


@pytest.fixture
def broken(tiny_directory: Path, tmp_path: Path) -> Path:
    """A copy of a pipeline directory, to be damaged."""
    return Path(shutil.copytree(tiny_directory, tmp_path / "broken"))


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "text_encoder_3", "vae"])
def test_a_missing_tensor_is_no_random_one(broken: Path, component: str) -> None:
    (file,) = (broken / component).glob("*.safetensors")
    tensors = load_file(file)
    lost = next(name for name in sorted(tensors) if name.endswith("weight") and tensors[name].ndim == 2)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=f"1 weight is missing in its files, e.g. '{lost}'"):
        load(broken, device="cpu")


def test_a_tokenizer_without_its_files_is_refused(broken: Path) -> None:
    shutil.move(broken / "tokenizer_2" / "tokenizer.json", broken / "kept.json")
    with pytest.raises(RunError, match=r"tokenizer_2 has no vocabulary \(.*tokenizer.json"):
        load(broken, device="cpu")
    shutil.move(broken / "kept.json", broken / "tokenizer_2" / "tokenizer.json")
    (broken / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(RunError, match="sets no model_max_length"):
        load(broken, device="cpu")
    shutil.rmtree(broken / "tokenizer_3")
    with pytest.raises(RunError, match="cannot be loaded"):
        load(broken, device="cpu")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "describes no pipeline: it holds a list, expected names of components"),
        ('"pipeline"', "it holds a str"),
        ('{"transformer": "SD3Transformer2DModel"}', "transformer is 'SD3Transformer2DModel', expected"),
        ('{"transformer": [null, null]}', "expected .library, class"),
        ("\xff", "cannot be read"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model_index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(RunError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "SanaWMTransformer3DModel", "QwenImage21Transformer2DModel"])
def test_cross_attention_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    index = {"_class_name": "AnyPipeline", "transformer": ["diffusers", name]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{name} (is not an MM-DiT: image tokens|cannot be probed: its layers)"):
        load(tmp_path)


def test_missing_weights_are_a_failure_in_one_line(broken: Path) -> None:
    for file in (broken / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(RunError, match="cannot be loaded") as error:
        load(broken, device="cpu")
    assert "\n" not in str(error.value)


def test_devices_and_dtypes(tiny_directory: Path) -> None:
    with pytest.raises(UserError, match="unknown dtype"):
        load(tiny_directory, dtype="float23")
    for given in (None, 3, ["scenes-sd3"]):
        with pytest.raises(UserError, match=r"model is .*; expected a name, a folder or a hub id"):
            load(given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"lora is \{\}; expected a name"):
        load(tiny_directory, lora={})  # type: ignore[arg-type]
    for name in ("gpu", "meta", "cuda:", "cpu:-1", "auto:0", "CUDA", "", "cuda:0:1", torch.device("meta")):
        for check in (pick_device, lambda name: check_device(str(name))):
            with pytest.raises(UserError, match="unknown device"):
                check(name)
    assert load(tiny_directory, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UserError, match="unknown device 'gpu:0': a GPU of NVIDIA or AMD is cuda, of Apple mps"):
        check_device("gpu:0")  # the closest name is xpu, which hardly anybody has
    absent = ["cuda:99", "mps:1", "cpu:1", "xpu:99"]
    absent += [] if torch.cuda.is_available() else ["cuda", "cuda:0"]
    absent += [] if torch.backends.mps.is_available() else ["mps"]
    for name in absent:
        with pytest.raises(UserError, match=f"device '{name}' is not available here: .*; use device auto or cpu"):
            pick_device(name)


def test_auto_is_the_fastest_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, device, dtype in (
        (True, True, "cuda", torch.bfloat16), (True, False, "cuda", torch.bfloat16),
        (False, True, "mps", torch.float32), (False, False, "cpu", torch.float32),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        found = pick_device("auto")
        assert (found.type, pick_dtype("auto", found)) == (device, dtype)


def test_devices_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told before torch is imported is what torch tells, for the build and the driver at hand."""
    assert devices("cuda") == torch.cuda.device_count() or torch.version.hip is not None
    assert devices("xpu") == torch.xpu.device_count() or torch.version.xpu is not None
    assert devices("mps") == torch.mps.device_count() and devices("cpu") == 1
    for built, said in (({"cuda": "13.0", "hip": None}, 2), ({"cuda": None, "hip": "7"}, None), ({"cuda": None}, 0)):
        monkeypatch.setattr("runpy.run_path", lambda path, built=built: built)
        monkeypatch.setattr("mmdit_probe.models.names._cuda_devices", lambda: 2)
        assert devices("cuda") == said
    monkeypatch.setattr("runpy.run_path", lambda path: {"cuda": "13.0"})
    with pytest.raises(UserError, match=r"device 'cuda:2' is not available here: the last one is cuda:1"):
        check_device("cuda:2")
    check_device("cuda:1")


@pytest.mark.parametrize(("failed", "count"), [(0, 3), (100, 0)])
def test_the_driver_counts_devices(monkeypatch: pytest.MonkeyPatch, failed: int, count: int) -> None:
    """`cuInit` fails with 100 where a driver finds no device; no driver is no device."""

    class Driver:
        def cuInit(self, flags: int) -> int:
            return failed

        def cuDeviceGetCount(self, found: Any) -> int:
            found._obj.value = 3
            return 0

    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver())
    assert names._cuda_devices() == count
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert names._cuda_devices() == 0


def test_a_hub_out_of_reach_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client tries six times for each file, with lines about it, before our message could be read."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import constants
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    from mmdit_probe.data.captions import Captioner
    from mmdit_probe.evaluate.blip import BlipAsker
    from mmdit_probe.experiments.outcomes import Dino
    from mmdit_probe.segment.clip import CLIP, _vision

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda source, **how: asked.append(how) or {})
    assert pipeline_index("nobody/nothing") == {} and asked == [{"local_files_only": True}]

    def none(source: str, **how: Any) -> None:
        for of in (how, how.get("adapter_kwargs", how)):
            asked.append({"local_files_only": of.get("local_files_only")})
        raise OSError

    for kind in (AutoConfig, AutoModel, AutoModelForImageTextToText):
        monkeypatch.setattr(kind, "from_pretrained", none)
    for opened in (CLIP.open, _vision, Captioner.load, BlipAsker.load, Dino):
        with pytest.raises(UserError):
            opened("nobody/nothing")  # type: ignore[operator]
    assert asked == [{"local_files_only": True}] * 11


def test_a_gated_or_missing_repository_says_which() -> None:
    from mmdit_probe.models.load import _hub_error

    class GatedRepoError(Exception):
        pass

    assert "gated" in str(_hub_error("a/b", GatedRepoError("401 Client Error")))
    assert "spelling" in str(_hub_error("a/b", OSError("404 Client Error. Entry Not Found")))


def test_pickled_weights_are_not_read(broken: Path) -> None:
    for file in (broken / "transformer").glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    with pytest.raises(RunError, match="cannot be loaded"):
        load(broken, device="cpu")


def test_an_adapter_that_is_no_safetensors_file_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    torch.save({"transformer.proj_out.lora_A.weight": torch.zeros(2)}, file)
    for source in (file, tmp_path):
        with pytest.raises(UserError, match="is no safetensors file"):
            load(tiny_directory, device="cpu", lora=source)
    with pytest.raises(UserError, match="is no safetensors file"):
        read_metadata(tmp_path)


def test_loading_says_nothing_and_leaves_no_trace(tiny_directory: Path) -> None:
    """In a process of its own: what the libraries say once is said at the first import."""
    script = f"""
import logging
from mmdit_probe import load
from mmdit_probe.models.load import check_references_of
from mmdit_probe.segment.clip import CLIP
CLIP.open("scenes-clip")
check_references_of({str(tiny_directory)!r}, 0)
model = load({str(tiny_directory)!r}, device="cpu")
from diffusers.utils import logging as first
from transformers.utils import logging as second
for module, name in ((first, "diffusers"), (second, "transformers")):
    assert module.is_progress_bar_enabled() and module.get_verbosity() == logging.WARNING
    assert [type(handler).__name__ for handler in logging.getLogger(name).handlers] == ["StreamHandler"]
print(model)
"""
    # A command that ran in this process has told the libraries to be quiet, which children inherit.
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=clean)
    assert done.stderr == ""
    name = str(tiny_directory)
    assert done.stdout == (
        f"MMDiT({name!r}: sd3, 3 layers x 2 heads, 22 text positions, 64 x 64 pixels, float32 on cpu)\n"
    )


def test_quiet_puts_back_what_the_caller_had() -> None:
    from transformers.utils import logging as library

    logger, handler = logging.getLogger("transformers"), logging.NullHandler()
    before = logger.handlers, logger.level
    logger.handlers = [handler]
    library.set_verbosity_error()
    try:
        with pytest.raises(KeyError), quiet() as notices:
            logger.getChild("models").warning("some weights")
            raise KeyError
        assert notices == ["some weights"] and logger.handlers == [handler] and logger.level == logging.ERROR
        assert library.is_progress_bar_enabled()
    finally:
        logger.handlers = before[0]
        logger.setLevel(before[1])
