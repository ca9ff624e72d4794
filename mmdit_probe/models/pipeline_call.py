"""What a stock pipeline calls its transformer with: the pipeline runs as it is and is stopped at that call.

    inputs = first_call(pipeline, "a red ring", height=512, width=512)
    inputs["img_ids"]                                # arguments of the transformer's forward, by name

So no pipeline's preparation (position ids, guidance embeddings, time shifts, sizes) is copied here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mmdit_probe.errors import RunError
from mmdit_probe.models.layout import unwrap


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one call of a module's forward, by name."""
    inputs = _signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    inputs.pop("self", None)
    further = inputs.pop("kwargs", {})
    return {**inputs, **further}


_signature = functools.lru_cache(maxsize=64)(inspect.signature)
"""Reading a signature takes as long as many calls of what it is of."""

_PICTURES = ("image", "images", "video")
"""Last words of arguments that take pictures."""


class _Stopped(Exception):
    """The pipeline has called its transformer: nothing more is needed of it."""


def first_call(pipeline: Any, prompt: str | Sequence[str], **options: Any) -> dict[str, Any]:
    """The arguments of the first transformer call that a stock pipeline makes for these prompts.

    Args:
        options: further arguments of the pipeline; one sampling step unless they say otherwise.

    A probe that is attached does not see the call.

    Raises:
        RunError: the pipeline wants more than a prompt, or never calls its transformer.
    """
    found: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(bind(unwrap(module), args, kwargs))
        raise _Stopped

    handle = pipeline.transformer.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        # By name: the first argument of some pipelines is a picture.
        pipeline(prompt=prompt if isinstance(prompt, str) else list(prompt), **({"num_inference_steps": 1} | options))
    except _Stopped:
        return found
    except Exception as error:
        known = inspect.signature(type(pipeline).__call__).parameters
        left = [name for name in known if name.rpartition("_")[2] in _PICTURES and name not in options]
        without = f" (without {', '.join(left)})" if left else ""
        raise RunError(f"{type(pipeline).__name__} cannot be run with a prompt alone{without}: {error}") from error
    finally:
        handle.remove()
    raise RunError(f"{type(pipeline).__name__} made an image without calling its transformer")
