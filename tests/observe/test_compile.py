"""Compiled models under the probe: whole graphs, the eager model's numbers, gradients that are right or refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.overrides import TorchFunctionMode

from mmdit_probe import AttentionMass, probe
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import watch
from mmdit_probe.edit import Scale
from mmdit_probe.errors import RunError
from mmdit_probe.magnet.tap import TextMapTap
from tests.families import FIXTURES


@pytest.fixture(autouse=True)
def _no_graphs_of_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Backend:
    """A backend of torch's that counts the graphs it is given, and the watched attention calls in them."""

    def __init__(self, name: str) -> None:
        self.inner, self.graphs, self.watched = lookup_backend(name), 0, 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        self.watched += sum("watched_attention" in str(node.target) for node in graph.graph.nodes)
        return self.inner(graph, inputs)


def ready_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalar code, which a compiler is through with sooner; skips where there is no compiler."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("inductor needs a C++ compiler, and none is found ($CXX, g++ or clang++)")
    monkeypatch.setattr(config.cpp, "simdlen", 0)
    monkeypatch.setattr(config, "compile_threads", 1)


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**inputs, return_dict=False)[0]
    return output


def masses(watched: Any) -> Tensor:
    return torch.tensor(watched[AttentionMass].table().mass.to_numpy())


def probed(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with probe(model, AttentionMass()) as watched:
        output = run(model, inputs)
    return output, masses(watched)


@pytest.mark.parametrize("name", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_attached_before_and_after_compiling_and_gone_afterwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "inductor":
        ready_inductor(monkeypatch)
    model, inputs = FIXTURES["sd3"].build(num_layers=1), FIXTURES["sd3"].inputs()
    _, plain = probed(model, inputs)
    backend = Backend(name)
    with probe(model, AttentionMass()) as before:
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        seen = run(compiled, inputs)
    assert (backend.graphs, backend.watched) == (1, 1)
    stock = run(compiled, inputs)  # detached: a graph without any trace of the probe
    assert (backend.graphs, backend.watched) == (2, 1)
    again, after = probed(compiled, inputs)
    assert torch.equal(run(compiled, inputs), stock)
    assert backend.graphs == 2  # neither the second probe nor its end compiled anything
    for output, found in ((seen, masses(before)), (again, after)):
        torch.testing.assert_close(output, stock, atol=1e-6, rtol=0)
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


def test_blocks_compiled_one_by_one_share_their_graph_under_the_probe() -> None:
    """Torch gives up after eight graphs of one function, and Flux has 38 single blocks."""
    model, inputs = FIXTURES["flux"].build(num_layers=1, num_single_layers=5), FIXTURES["flux"].inputs()
    (stock, plain), backend = probed(model, inputs), Backend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    assert torch.equal(run(model, inputs), stock)
    without, backend.watched = backend.graphs, 0
    output, found = probed(model, inputs)
    assert torch.equal(output, stock) and torch.equal(found, plain)
    assert backend.watched == 2 and backend.graphs == without + 2  # one of each kind of block


def test_a_compiled_model_can_be_probed_any_number_of_times() -> None:
    model, inputs = FIXTURES["sd3"].build(num_layers=1), FIXTURES["sd3"].inputs()
    _, plain = probed(model, inputs)
    backend = Backend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        assert torch.equal(probed(compiled, inputs)[1], plain)
        run(compiled, inputs)
    assert backend.graphs == 2


def test_a_pipeline_whose_transformer_is_compiled(pipe: Any) -> None:
    def sample() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe("a red ring", num_inference_steps=2, generator=generator, output_type="latent").images

    with probe(pipe, AttentionMass()) as plain:
        stock = sample()
    backend = Backend("eager")
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)
    assert torch.equal(sample(), stock)
    with probe(pipe, AttentionMass()) as watched:
        assert torch.equal(sample(), stock)
    assert torch.equal(sample(), stock)
    assert watched[AttentionMass].table().equals(plain[AttentionMass].table())  # words, branches and steps too
    assert backend.graphs == 2 and backend.watched == len(watched.layers)


def test_an_edit_of_a_compiled_model_is_that_of_the_eager_one_and_has_no_wrong_gradient() -> None:
    model, inputs = FIXTURES["sd3"].build(num_layers=1), FIXTURES["sd3"].inputs()
    weight = model.transformer_blocks[0].attn.to_q.weight
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with probe(model, edits=Scale("image", "text", factor=0.0)):
        expected = run(model, inputs)
        edited = compiled(**inputs, return_dict=False)[0]
        torch.testing.assert_close(edited, expected, atol=1e-5, rtol=0)
        with pytest.raises(RunError, match="uncompiled"):
            edited.square().mean().backward()
    with probe(model, AttentionMass()):
        output = compiled(**inputs, return_dict=False)[0]
    assert not torch.allclose(output, expected, atol=1e-3)
    output.square().mean().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


class LouderQueries(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            args = (2.0 * args[0], *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_a_function_mode_and_autocast_have_their_effect_in_a_compiled_model(mode: bool, autocast: bool) -> None:
    model, inputs = FIXTURES["sd3"].build(num_layers=1), FIXTURES["sd3"].inputs()
    plain = run(model, inputs)
    with ExitStack() as stack:
        if autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if mode:
            stack.enter_context(LouderQueries())
        stock = run(model, inputs)
        assert torch.equal(stock, plain) == (not autocast and not mode)
        expected = probed(model, inputs)[1]
        seen, found = probed(torch.compile(model, fullgraph=True, backend="eager"), inputs)
    assert torch.equal(seen, stock)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_maps_for_training_refuse_a_compiled_model() -> None:
    """Its maps would be constants: beside another loss, nothing would tell that they are not trained on."""
    model, inputs = FIXTURES["sd3"].build(num_layers=1), FIXTURES["sd3"].inputs()
    compiled = torch.compile(model, backend="eager")
    tap = TextMapTap([0])
    with probe(compiled, edits=tap):
        run(compiled, inputs)  # a forward that nobody began is nobody's concern
        tap.begin()
        with pytest.raises(RunError, match="layer 0 is compiled"):
            compiled(**inputs)


class Biased(nn.Module):
    """Attention with a learned bias of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 2, 9, 9))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=self.bias)


class Silent:
    def wants(self, module_call: Any) -> Any:
        return "lse"

    def record(self, record: Any) -> None:
        assert isinstance(record.call, SDPACall)


def test_a_learned_bias_keeps_its_gradient_in_a_compiled_graph() -> None:
    torch.manual_seed(0)
    module, tokens = Biased(), torch.randn(2, 2, 9, 16)

    def gradient(callee: Any) -> Tensor:
        module.zero_grad()
        callee(tokens).square().sum().backward()
        assert module.bias.grad is not None
        return module.bias.grad.clone()

    plain = gradient(module)
    detach = watch(module, Silent(), "record")
    found = gradient(torch.compile(module, fullgraph=True, backend="aot_eager"))
    detach()
    assert plain.abs().max() > 0
    torch.testing.assert_close(found, plain)
