"""Interception: who sees what in which order, and that nothing stays behind."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import ModuleCall, Record, hook, interpose, watch


class Attention(nn.Module):
    """The smallest attention module; counts nothing, keeps nothing."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5)


class Recorder:
    def __init__(self, want: str = "lse") -> None:
        self.want, self.records = want, []  # type: tuple[str, list[Record]]

    def wants(self, module_call: ModuleCall) -> Any:
        return self.want

    def record(self, record: Record) -> None:
        self.records.append(record)


def halves(call: SDPACall, module_call: ModuleCall, proceed: Callable[[SDPACall], Tensor]) -> Tensor:
    """An edit that splits the call by query rows and changes the second half's values."""
    first = proceed(SDPACall(call.query[:, :, :4], call.key, call.value, scale=call.scale))
    second = proceed(SDPACall(call.query[:, :, 4:], call.key, 2 * call.value, scale=call.scale))
    return torch.cat([first, second], 2)


def double_queries(call: SDPACall, module_call: ModuleCall) -> SDPACall:
    return SDPACall(2 * call.query, call.key, call.value, scale=call.scale)


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)


@pytest.mark.parametrize("want", ["nothing", "call", "lse"])
def test_recording_is_bitwise_neutral(want: str, tensors: Any) -> None:
    module, recorder = Attention(), Recorder(want)
    stock = module(*tensors)
    detach = watch(module, recorder, "record")
    assert torch.equal(module(*tensors), stock)
    assert len(recorder.records) == (want != "nothing")
    detach()
    assert torch.equal(module(*tensors), stock)
    assert len(recorder.records) == (want != "nothing")
    assert "forward" not in module.__dict__ and not [name for name in module.__dict__ if "mmdit" in name]


@pytest.mark.parametrize("edit_first", [True, False])
def test_a_recorder_sees_one_full_call_whenever_an_edit_was_attached(edit_first: bool, tensors: Any) -> None:
    module, recorder = Attention(), Recorder()
    stock = module(*tensors)
    order = [(halves, "output"), (recorder, "record")]
    for handler, stage in order if edit_first else reversed(order):
        watch(module, handler, stage)  # type: ignore[arg-type]
    edited = module(*tensors)
    (record,) = recorder.records
    assert record.call.query.shape[2] == 9 and torch.equal(record.call.value, tensors[2])
    assert torch.equal(record.output, edited)
    assert torch.equal(edited[:, :, :4], stock[:, :, :4])
    assert torch.allclose(edited[:, :, 4:], 2 * stock[:, :, 4:])
    # The log-sum-exp belongs to the full call before the edit.
    expected = (0.5 * tensors[0].double() @ tensors[1].double().transpose(-1, -2)).logsumexp(-1)
    assert record.lse is not None and (record.lse - expected).abs().max() < 1e-5


def test_a_changed_input_is_what_later_stages_see(tensors: Any) -> None:
    module, recorder = Attention(), Recorder()
    watch(module, recorder, "record")
    watch(module, double_queries, "input")
    output = module(*tensors)
    assert torch.equal(recorder.records[0].call.query, 2 * tensors[0])
    assert torch.equal(output, Attention()(2 * tensors[0], *tensors[1:]))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_handlers_come_off_in_any_order(order: tuple[int, ...], tensors: Any) -> None:
    module, recorder = Attention(), Recorder()
    stock = module(*tensors)
    off = [watch(module, halves, "output"), watch(module, recorder, "record"), watch(module, double_queries, "input")]
    active = {0, 1, 2}
    for index in order:
        off[index]()
        active.discard(index)
        seen = len(recorder.records)
        output = module(*tensors)
        assert len(recorder.records) - seen == (1 in active)
        assert torch.equal(output, stock) == (not active & {0, 2})
    assert "forward" not in module.__dict__
    off[0]()  # a second time does nothing
    assert torch.equal(module(*tensors), stock)


def test_an_error_inside_leaves_no_mode_behind(tensors: Any) -> None:
    module = Attention()

    def fails(call: SDPACall, module_call: ModuleCall, proceed: Any) -> Tensor:
        raise RuntimeError("edit failed")

    detach = watch(module, fails, "output")
    with pytest.raises(RuntimeError, match="edit failed"):
        module(*tensors)
    detach()
    recorder = Recorder()
    other = Attention()
    watch(other, recorder, "record")
    module(*tensors)
    assert recorder.records == []


def test_only_the_watched_module_is_seen(tensors: Any) -> None:
    watched, other, recorder = Attention(), Attention(), Recorder()
    watch(watched, recorder, "record")
    other(*tensors)
    torch.nn.functional.scaled_dot_product_attention(*tensors)
    assert recorder.records == []
    watched(*tensors)
    assert len(recorder.records) == 1


def test_interpose_under_a_foreign_wrapper_goes_silent_and_can_come_back() -> None:
    module, seen = Attention(), []
    tensors = [torch.randn(1, 1, 3, 8) for _ in range(3)]

    def handler(proceed: Any, *args: Any) -> Any:
        seen.append(len(args))
        return proceed(*args)

    detach = interpose(module, "forward", handler)
    ours = module.forward
    module.forward = lambda *args: ours(*args)  # type: ignore[method-assign]
    module(*tensors)
    detach()
    module(*tensors)
    assert seen == [3]
    again = interpose(module, "forward", handler)
    module(*tensors)
    assert seen == [3, 3]
    again()
    module(*tensors)
    assert seen == [3, 3]


def test_interpose_gives_back_an_instance_method_of_before() -> None:
    module = Attention()
    own = module.forward
    module.forward = own  # type: ignore[method-assign]
    interpose(module, "forward", lambda proceed, *args: proceed(*args))()
    assert module.__dict__["forward"] is own


class Halved(TorchFunctionMode):
    """A mode that answers for attention with half of the values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return args[2] / 2
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("edited", [False, True])
def test_other_modes_come_first_and_stay_where_they_were(edited: bool, tensors: Any) -> None:
    """Handlers see what the others leave of a call: of this one, nothing."""
    module, recorder = Attention(), Recorder()
    watch(module, recorder, "record")
    if edited:
        watch(module, halves, "output")
    with Halved() as mode:
        assert torch.equal(module(*tensors), tensors[2] / 2)
        with pytest.raises(TypeError):
            module(*tensors[:2])
        assert _get_current_function_mode_stack() == [mode]
    assert recorder.records == []
    module(*tensors)
    assert len(recorder.records) == 1


def test_handlers_run_without_modes_and_autocast_on_what_the_kernel_gets(tensors: Any) -> None:
    module, recorder, seen = Attention(), Recorder(), []

    def look(call: SDPACall, module_call: ModuleCall) -> SDPACall:
        seen.append((torch.is_autocast_enabled("cpu"), len(_get_current_function_mode_stack())))
        return call

    with torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
        stock = module(*tensors)
        watch(module, recorder, "record")
        watch(module, look, "input")
        assert torch.equal(module(*tensors), stock)
    (record,) = recorder.records
    assert seen == [(False, 0)] and stock.dtype == torch.bfloat16
    assert record.call.query.dtype == record.call.value.dtype == torch.bfloat16


def test_a_call_whose_batch_broadcasts_is_seen_with_all_its_samples(tensors: Any) -> None:
    module, recorder = Attention(), Recorder()
    query, key, value = tensors
    several = torch.cat([query, 2 * query])
    stock = module(several, key, value)
    watch(module, recorder, "record")
    assert torch.equal(module(several, key, value), stock)
    (record,) = recorder.records
    assert record.lse is not None and len(record.call.key) == len(record.lse) == 2
    expected = (0.5 * several.double() @ key.double().mT).logsumexp(-1)
    assert (record.lse - expected).abs().max() < 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_plain_whatever_wraps_the_forward(copied: Any, tensors: Any) -> None:
    module, recorder = Attention(), Recorder()
    plain = set(module.__dict__)
    detach, unhook = watch(module, recorder, "record"), hook(module, lambda *_: None, lambda *_: None)
    twin = copied(module)
    assert not twin._forward_hooks and not twin._forward_pre_hooks
    assert torch.equal(twin(*tensors), Attention()(*tensors)) and recorder.records == []
    assert set(twin.__dict__) == plain
    module(*tensors)
    assert len(recorder.records) == 1
    copy.copy(module)(*tensors)  # shares what is watched
    assert len(recorder.records) == 2
    detach()
    unhook()
    assert set(module.__dict__) == plain
