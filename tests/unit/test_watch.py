import copy
import pickle

import pytest
import torch
from torch import nn

from offload_engine.watch import same_content, unwatch, watch, watch_process


@pytest.fixture
def parameter():
    undo = watch_process()
    value = nn.Parameter(torch.randn(40, 30))
    watch(value)
    yield value
    undo()


def test_the_watch_leaves_no_trace_on_torch():
    before = dict(vars(nn.Parameter))
    undo = watch_process()
    assert dict(vars(nn.Parameter)) != before
    undo()
    assert dict(vars(nn.Parameter)) == before


def test_a_watched_parameter_is_a_parameter_like_any_other(parameter):
    assert type(parameter) is nn.Parameter
    assert type(parameter.data) is torch.Tensor
    other = nn.Parameter(torch.ones(2))
    other.data.add_(1)
    assert not unwatch(other)


@pytest.mark.parametrize(
    "take",
    [
        lambda p: p.data.add_(1),
        lambda p: p.data,
        lambda p: p.detach(),
        lambda p: p.untyped_storage(),
        lambda p: p.storage(),
        lambda p: p.requires_grad_(False).__dlpack__(),
        lambda p: nn.ParameterList([p]).state_dict(),
    ],
)
def test_taking_the_data_leaves_a_mark(parameter, take):
    take(parameter)
    assert unwatch(parameter)
    assert type(parameter) is nn.Parameter
    assert not unwatch(parameter)


def test_running_leaves_none(parameter):
    linear = nn.Linear(30, 40, bias=False)
    linear.weight = parameter
    linear(torch.randn(2, 30)).sum().backward()
    assert not unwatch(parameter)


def test_a_step_of_an_optimizer_leaves_a_mark(parameter):
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], fused=True).step()
    assert unwatch(parameter)


def test_a_buffer_is_watched_too():
    buffer = torch.ones(4)
    watch(buffer)
    buffer.data.zero_()
    assert unwatch(buffer) and type(buffer) is torch.Tensor


def test_copies_and_pickles_are_plain(parameter):
    for other in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert type(other) is nn.Parameter and torch.equal(other, parameter)
        assert other.requires_grad and other.data_ptr() != parameter.data_ptr()
    assert isinstance(parameter, nn.Parameter)


EDITS = {
    "one element": lambda t: t.view(-1)[7].add_(1),
    "negation": lambda t: t.neg_(),
    "doubling": lambda t: t.mul_(2),
    "reversal": lambda t: t.copy_(t.flip(0)),
    "swap": lambda t: _swap(t),
    "zero": lambda t: t.zero_(),
}


def _swap(tensor):
    flat = tensor.view(-1)
    flat[3], flat[4] = flat[4].clone(), flat[3].clone()


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_no_edit_goes_unseen(edit, dtype):
    before = torch.randint(1, 100, (64, 48)).to(dtype)
    before.view(-1)[4] += 1 if before.view(-1)[4] == before.view(-1)[3] else 0
    after = before.clone()
    assert same_content(before, after)
    edit(after)
    assert not same_content(before, after)


def test_content_of_any_shape_and_stride_is_compared():
    for tensor in (
        torch.empty(0),
        torch.tensor(1.0),
        torch.randn(3, dtype=torch.float16),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor([True, False, True]),
        torch.randn(1 << 21),
    ):
        other = tensor.clone()
        assert same_content(tensor, other)
        if tensor.numel():
            last = tuple(size - 1 for size in tensor.shape)
            other[last] = not other[last] if tensor.dtype is torch.bool else other[last] + 1
            assert not same_content(tensor, other)
