"""What the weights of public models need in a GPU's memory, from their configurations: nothing is downloaded or filled.

    python benchmarks/model_memory.py --out benchmarks/results/model_memory.md

Models are built on torch's meta device, where parameters have shapes only. 16 bits a parameter; int8 and fp8 store
the transformer's linear weights in 8, nf4 in 4 and half a bit of scales. The docs show the table.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from sizes import SIZES

from mmdit_probe.errors import run_script

GIB = 2**30
LAYERS = {
    "sd3-medium": {"num_layers": 24}, "sd35-large": {"num_layers": 38},
    "flux": {"num_layers": 19, "num_single_layers": 38}, "qwen-image": {"num_layers": 60},
}  # fmt: skip
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
_T5 = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_QWEN_TEXT = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
}  # fmt: skip
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "CLIP-L": (
        "CLIPTextModelWithProjection", "CLIPTextConfig",
        {**_CLIP, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "projection_dim": 768},
    ),
    "CLIP-G": (
        "CLIPTextModelWithProjection", "CLIPTextConfig",
        {**_CLIP, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
         "projection_dim": 1280},
    ),
    "T5-XXL": ("T5EncoderModel", "T5Config", _T5),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION, "tie_word_embeddings": False},
    ),
}  # fmt: skip
"""Class and configuration of the text encoders, as their public configs state them."""
_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, tuple[str, ...], str, dict[str, Any]]] = {
    "SD3-medium": ("sd3-medium", ("CLIP-L", "CLIP-G", "T5-XXL"), "AutoencoderKL", _KL),
    "SD3-medium, `--no-t5`": ("sd3-medium", ("CLIP-L", "CLIP-G"), "AutoencoderKL", _KL),
    "SD3.5-large": ("sd35-large", ("CLIP-L", "CLIP-G", "T5-XXL"), "AutoencoderKL", _KL),
    "Flux.1": ("flux", ("CLIP-L", "T5-XXL"), "AutoencoderKL", _KL),
    "Qwen-Image": ("qwen-image", ("Qwen2.5-VL",), "AutoencoderKLQwenImage", {}),
}
"""Model -> blocks of its transformer, text encoders, class and configuration of its autoencoder."""


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters and, apart, of what buffers hold; of the parameters those in the weights of linear layers,
    which quantisers store in fewer bits."""

    parameters: int
    linear: int
    buffers: int

    def gib(self, bits: float = 16.0) -> float:
        """GiB with linear weights in so many bits and the rest in 16."""
        return (self.linear * bits / 8 + (self.parameters + self.buffers - self.linear) * 2) / GIB


def weights_of(model: Any) -> Weights:
    from torch import nn

    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    parameters, buffers = (sum(tensor.numel() for tensor in of()) for of in (model.parameters, model.buffers))
    return Weights(parameters, linear, buffers)


def built(module: str, kind: str, config: dict[str, Any], config_kind: str = "") -> Weights:
    """The parameters of a model of a library by its configuration."""
    import importlib

    import torch

    library = importlib.import_module(module)
    with torch.device("meta"):
        if config_kind:
            return weights_of(getattr(library, kind)(getattr(library, config_kind)(**config)))
        return weights_of(getattr(library, kind)(**config))


def row(name: str) -> str:
    """One model's line of the table."""
    blocks, encoders, autoencoder, options = MODELS[name]
    kind, config = SIZES[blocks]
    transformer = built("diffusers", kind, config | LAYERS[blocks])
    texts = [built("transformers", made, of, by).gib() for made, by, of in (ENCODERS[part] for part in encoders)]
    rest = built("diffusers", autoencoder, options).gib()
    largest = [max(transformer.gib(bits), *texts, rest) for bits in (16.0, 8.0, 4.5)]
    cells = [transformer.gib(), sum(texts), transformer.gib() + sum(texts) + rest, *largest]
    return f"| {name} ({transformer.parameters / 1e9:.2f} B) | {' | '.join(f'{cell:.1f}' for cell in cells)} |"


def report() -> str:
    head = ["model (transformer)", "transformer", "text encoders", "all", "`--offload model`", "with int8", "with nf4"]
    return "\n".join([f"| {' | '.join(head)} |", "|-|-:|-:|-:|-:|-:|-:|", *map(row, MODELS)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write; printed if left out")
    options = parser.parse_args()
    text = report()
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
