"""Streaming as it is used: what may be asked for, what changes and fails on the way, in company.

Wherever memory is short the simulated device has exactly the budget.
"""

import contextlib
import copy
import gc

import pytest
import torch
from torch import nn

import offload_engine
from benchmarks.pipelines import PIPELINES
from benchmarks.scaled import Block, build, noise, weights_nbytes
from offload_engine import sim
from offload_engine.errors import ComponentError, OffloadError
from offload_engine.plan import PlanError

from .miniature import measured, unoffloaded, untouched
from .streamed import SMALL, check, streamed

pytestmark = pytest.mark.usefixtures("clean")


# ---- what the user asks for


def test_the_user_may_name_the_blocks(sim_device):
    pipe, x = build(SMALL), noise()
    expected = unoffloaded(pipe, x)
    engine = streamed(pipe, blocks=["transformer.row_0", "vae.row_0.1", "vae.row_0.2"])
    names = [name for name in engine._residency.units if not name.startswith("te")]
    assert [name for name in names if "/" not in name] == [
        "transformer",
        *(f"transformer.row_0.{number}" for number in range(8)),
        "vae",
        "vae.row_0.1",
        "vae.row_0.2",
    ]
    for _ in range(4):
        torch.accelerator.reset_peak_memory_stats()
        check(measured(lambda: pipe(x)), expected, engine)


def test_named_blocks_are_cut_even_where_everything_fits(sim_device):
    pipe, x = build(SMALL), noise()
    expected = unoffloaded(pipe, x)
    with offload_engine.attach(pipe, vram="8GiB", blocks=["transformer.row_0"]) as engine:
        assert len([name for name in engine._residency.units if "/" not in name]) == 3 + 8
        for number in range(4):
            call = measured(lambda: pipe(x))
            assert torch.equal(call.output, expected.output)
            assert number == 0 or call.moved.h2d_nbytes == x.nbytes


def test_blocks_without_a_budget_are_refused(sim_device):
    pipe = build(SMALL)
    with pytest.raises(OffloadError, match="give vram"):
        offload_engine.attach(pipe, blocks=["transformer.row_0"])
    assert untouched(pipe)


@pytest.mark.parametrize(
    ("path", "near"),
    [("transformer.row_O", "'transformer.row_0'"), ("transfomer.row_0", "'transformer'")],
)
def test_a_block_that_does_not_exist_is_named_with_near_matches(sim_device, path, near):
    pipe = build(SMALL)
    with pytest.raises(ComponentError, match=near) as error:
        streamed(pipe, blocks=["te.row_0", path])
    assert error.value.names == (path,)
    assert untouched(pipe)


def test_a_budget_below_the_largest_block_is_refused_with_what_it_takes(sim_device):
    pipe, pinned = build(SMALL), sim.counters().pinned_nbytes
    with pytest.raises(PlanError) as error:
        offload_engine.attach(pipe, vram=20_000)
    needed = error.value.needed_nbytes
    assert error.value.budget_nbytes == 20_000
    block, rest = pipe.transformer.row_0[0], pipe.transformer.first
    tensors = [*block.parameters(), *rest.parameters()]
    assert needed == sum(t.nbytes for t in tensors)
    assert str(needed) in str(error.value)
    assert untouched(pipe)
    assert sim.counters().pinned_nbytes == pinned
    assert torch.accelerator.memory_allocated() == 0
    with pytest.raises(PlanError):
        offload_engine.attach(pipe, vram=needed - 1)
    assert untouched(pipe)
    offload_engine.attach(pipe, vram=needed).detach()


def test_the_smallest_budget_that_works_is_enough(sim_device):
    """The rest, one block and the activations: nothing is fetched ahead, everything runs."""
    pipe, x = build(SMALL), noise()
    expected = unoffloaded(pipe, x)
    engine = offload_engine.attach(pipe, vram=50_000)
    torch.accelerator.reset_peak_memory_stats()
    careful = measured(lambda: pipe(x)).peak_nbytes
    engine.detach()
    assert careful <= 50_000
    with offload_engine.attach(pipe, vram=careful) as engine:
        sim.configure(capacity_nbytes=careful)
        for _ in range(4):
            torch.accelerator.reset_peak_memory_stats()
            call = measured(lambda: pipe(x))
            check(call, expected, engine)


@pytest.mark.parametrize("first", [None, "8GiB"])
def test_attaching_again_cuts_anew(sim_device, first):
    pipe, x = build(SMALL), noise()
    expected = unoffloaded(pipe, x)
    offload_engine.attach(pipe, vram=first)
    pipe(x)
    engine = streamed(pipe)
    for _ in range(2):
        call = measured(lambda: pipe(x))
        check(call, expected, engine)
    sim.configure(capacity_nbytes=2**33)
    engine = offload_engine.attach(pipe, vram="8GiB", blocks=["transformer.row_0"])
    assert sum("row_0" in unit.name and "/" not in unit.name for unit in engine._units) == 8
    engine = offload_engine.attach(pipe)
    assert {unit.name for unit in engine._units} == {"te", "transformer", "vae"}
    assert torch.equal(pipe(x), expected.output)
    engine.detach()
    assert untouched(pipe)


# ---- changes


class LowRank(nn.Module):
    """A linear layer with an adapter, as peft puts it in its place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def add_adapters(pipe):
    torch.manual_seed(3)
    for block in pipe.transformer.row_0:
        block.up = LowRank(block.up)


def remove_adapters(pipe):
    for block in pipe.transformer.row_0:
        if isinstance(block.up, LowRank):
            block.up = block.up.base_layer


def change_in_place(pipe):
    with torch.no_grad():
        for block in pipe.transformer.row_0:
            block.down.bias.add_(0.25)


def change_by_data(pipe):
    for block in pipe.transformer.row_0:
        block.up.weight.data += 0.03


def replace_weights(pipe):
    """It takes device memory of its own."""
    sim.configure(capacity_nbytes=10**7)
    for block in pipe.transformer.row_0:
        block.up.weight = nn.Parameter(block.up.weight.detach() * 1.5)


def load_weights(pipe):
    state = {k: v.detach().cpu() * 0.9 for k, v in pipe.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(state)


def assign_weights(pipe):
    state = {k: v.detach().cpu() * 0.8 for k, v in pipe.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(state, assign=True)


def replace_a_block(pipe):
    torch.manual_seed(4)
    pipe.transformer.row_0[2] = Block(25_000, 0.02)


def drop_a_block(pipe):
    del pipe.transformer.row_0[3]


def add_a_block(pipe):
    torch.manual_seed(5)
    pipe.transformer.row_0.append(Block(25_000, 0.02))


def cast(pipe):
    pipe.transformer.to(torch.float64)


def cast_and_back(pipe):
    pipe.transformer.to(torch.float64)
    pipe.transformer.to(torch.float32)


def cast_a_block(pipe):
    pipe.transformer.row_0[4].to(torch.bfloat16).to(torch.float32)


CHANGES = (
    add_adapters,
    change_in_place,
    change_by_data,
    replace_weights,
    load_weights,
    assign_weights,
    replace_a_block,
    drop_a_block,
    add_a_block,
    cast,
    cast_and_back,
    cast_a_block,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_calls_is_seen_by_the_next(sim_device, change):
    pipe, x = build(SMALL), noise()
    plain = copy.deepcopy(pipe)
    engine = streamed(pipe, 0.7)
    for _ in range(3):
        pipe(x)
    change(pipe)
    change(plain)
    for round_ in range(3):
        if round_ == 2 and change is add_adapters:
            remove_adapters(pipe)
            remove_adapters(plain)
        sim.configure(capacity_nbytes=10**7)
        expected = unoffloaded(plain, x)
        sim.configure(capacity_nbytes=engine.vram_nbytes)
        torch.accelerator.reset_peak_memory_stats()
        call = measured(lambda: pipe(x))
        assert torch.equal(call.output, expected.output)
        assert call.peak_nbytes <= engine.vram_nbytes or change is replace_weights
    engine.detach()
    assert torch.equal(pipe(x), expected.output)


IN_A_CALL = (change_in_place, change_by_data, replace_weights, load_weights, cast_and_back, cast)


@pytest.mark.parametrize("planned", [False, True], ids=["first call", "planned call"])
@pytest.mark.parametrize("change", IN_A_CALL)
def test_a_change_in_the_middle_of_a_call_is_seen_at_once(sim_device, change, planned):
    pipe, x = build(SMALL), noise()
    plain = copy.deepcopy(pipe)

    def at_step_2(pipe, step):
        if step == 1:
            change(pipe)

    engine = streamed(pipe, 0.7)
    for _ in range(3 if planned else 0):
        pipe(x)
    for _ in range(2):
        sim.configure(capacity_nbytes=10**7)
        expected = unoffloaded(plain, x, on_step=at_step_2)
        sim.configure(capacity_nbytes=engine.vram_nbytes)
        torch.accelerator.reset_peak_memory_stats()
        call = measured(lambda: pipe(x, on_step=at_step_2))
        assert torch.equal(call.output, expected.output)
        assert call.peak_nbytes <= engine.vram_nbytes or change is replace_weights
        for each in (pipe, plain):
            each.transformer.to(torch.float32)
    engine.detach()
    for name, tensor in plain.transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], tensor)


# ---- failures


class Stopped(BaseException):
    """What an interrupt is, without stopping the test run."""


@pytest.mark.parametrize("planned", [False, True], ids=["first call", "planned call"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped, ValueError, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", [0, 21])
def test_after_an_error_inside_a_block_the_next_call_works(sim_device, at, error, planned):
    pipe, x = build(SMALL), noise()
    expected, count = unoffloaded(pipe, x), iter(range(100))
    engine = streamed(pipe)
    for _ in range(3 if planned else 0):
        pipe(x)

    def fail():
        if next(count) == at:
            raise error("mine")

    for block in pipe.transformer.row_0:
        block.on_forward = fail
    with pytest.raises(error, match="mine"):
        pipe(x)
    for block in pipe.transformer.row_0:
        block.on_forward = None
    for _ in range(3):
        torch.accelerator.reset_peak_memory_stats()
        check(measured(lambda: pipe(x)), expected, engine)
    engine.release()
    gc.collect()
    assert torch.accelerator.memory_allocated() == 0
    engine.detach()


@pytest.mark.parametrize("planned", [False, True], ids=["first call", "planned call"])
def test_wherever_memory_runs_out_the_user_sees_it_or_nothing_at_all(sim_device, planned):
    pipe, x = build(SMALL), noise()
    expected, seen = unoffloaded(pipe, x), set()
    engine = streamed(pipe)
    for after in range(1, 240, 19):
        engine.detach()
        engine = streamed(pipe)
        for _ in range(2 if planned else 0):
            pipe(x)
        sim.inject_oom(after)
        try:
            assert torch.equal(pipe(x), expected.output)
            seen.add("nothing")
        except torch.OutOfMemoryError:
            seen.add("error")
        assert torch.equal(pipe(x), expected.output)
        engine.release()
        assert torch.accelerator.memory_allocated() == 0
    assert seen == {"nothing", "error"}


def test_an_error_keeps_no_tensor_alive(sim_device):
    pipe, x = build(SMALL), noise()
    gc.collect()
    gc.disable()
    try:
        with streamed(pipe) as engine:
            sim.inject_oom(30)
            with contextlib.suppress(torch.OutOfMemoryError):
                pipe(x)
            engine.release()
            assert torch.accelerator.memory_allocated() == 0
    finally:
        gc.enable()


# ---- several pipelines


def test_two_streamed_pipelines_share_one_budget(sim_device):
    pipes, x = [build(SMALL, seed=1), build(SMALL, seed=2)], noise()
    expected = [unoffloaded(pipe, x) for pipe in pipes]
    engines = [streamed(pipe) for pipe in pipes]
    assert engines[0]._residency is engines[1]._residency
    for number in (0, 1, 0, 0, 1, 1, 0, 1):
        torch.accelerator.reset_peak_memory_stats()
        check(measured(lambda number=number: pipes[number](x)), expected[number], engines[number])
    engines[0].detach()
    check(measured(lambda: pipes[1](x)), expected[1], engines[1])


@pytest.mark.parametrize("other", ["streamed", "chain mode"])
def test_a_streamed_pipeline_shares_its_encoder_with_another(sim_device, other):
    one, two, x = build(SMALL, seed=1), build(SMALL, seed=2), noise()
    two.te = one.te
    expected = [unoffloaded(one, x), unoffloaded(two, x)]
    first = streamed(one)
    budget = first.vram_nbytes
    second = offload_engine.attach(two, vram=budget if other == "streamed" else None)
    if other != "streamed":
        sim.configure(capacity_nbytes=10 * budget)
    for number in (0, 1, 0, 0, 1, 1, 0, 1):
        pipe = (one, two)[number]
        torch.accelerator.reset_peak_memory_stats()
        call = measured(lambda pipe=pipe: pipe(x))
        assert torch.equal(call.output, expected[number].output)
        if other == "streamed":
            assert call.peak_nbytes <= budget
    first.detach()
    assert torch.equal(two(x), expected[1].output)
    second.detach()
    assert torch.equal(one(x), expected[0].output)


# ---- on the host


def test_a_pipeline_that_runs_blocks_by_hand_on_the_host_gets_results_there(sim_device):
    """Ideogram 4 asks for the device of its text encoder and runs its layers itself."""
    case = PIPELINES["ideogram4"]
    pipe = case.build("tiny").to(sim_device)
    torch.accelerator.reset_peak_memory_stats()
    expected = measured(lambda: case.run(pipe, 2))
    del pipe
    gc.collect()
    pipe = case.build("tiny")
    budget = expected.peak_nbytes - weights_nbytes(pipe) // 2
    engine = offload_engine.attach(pipe, case.seq, vram=budget)
    assert any(name.startswith("text_encoder.") for name in engine._residency.units)
    for _ in range(3):
        torch.accelerator.reset_peak_memory_stats()
        call = measured(lambda: case.run(pipe, 2))
        assert torch.equal(call.output, expected.output)
        assert call.peak_nbytes <= budget
