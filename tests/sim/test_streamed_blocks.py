"""Streaming blocks of every kind: nested, tied, conditional, out of order, compiled.

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
from benchmarks.scaled import WIDTH, Block, Stack, Streamed, build, noise, weights_nbytes
from offload_engine import sim

from .miniature import measured, unoffloaded
from .streamed import SMALL, check, deep_flux, streamed

pytestmark = pytest.mark.usefixtures("clean")


# ---- blocks that are not simply called one after the other


class Twice(Stack):
    """Each block runs twice in a row, and the whole row twice."""

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            for block in self.row_0:
                x = block(block(x))
        return x


class Conditional(Stack):
    """In each step other blocks are left out; sometimes all of them."""

    step = 0

    def forward(self, x):
        x = self.first(x)
        for number, block in enumerate(self.row_0):
            if self.step != 3 and (number + self.step) % 3:
                x = block(x)
        return x


class Shuffled(Stack):
    """The order of the blocks is another one in each step."""

    step = 0

    def forward(self, x):
        x = self.first(x)
        for number in range(8):
            x = self.row_0[number * (2 * self.step + 1) % 8](x)
        return x


class Remembering(Stack):
    """As a UNet: later blocks take in what earlier ones gave."""

    def forward(self, x):
        x, given = self.first(x), []
        for number, block in enumerate(self.row_0):
            x = block(x) if number < 4 else block(x + given.pop())
            given.append(x)
        return x


class OtherMethod(Block):
    def attend(self, x):
        return torch.tanh(x + self.down(self.up(x)))


class ByMethod(Stack):
    """Blocks are entered by a method of their own, which calls what is in them."""

    def forward(self, x):
        x = self.first(x)
        for block in self.row_0:
            x = block.attend(x)
        return x


class ByPart(Stack):
    """What is in the blocks is called from outside."""

    def forward(self, x):
        x = self.first(x)
        for block in self.row_0:
            x = x + block.down(torch.tanh(block.up(x)))
        return x


class Encoding(Block):
    def encode(self, x):
        return torch.tanh(nn.functional.linear(x, self.up.weight)) @ self.up.weight


class ByEntryMethod(Stack):
    """Blocks are entered by a known method, which reads weights itself."""

    def forward(self, x):
        x = self.first(x)
        for block in self.row_0:
            x = block.encode(x)
        return x


class Nested(Stack):
    """Lists of lists of blocks."""

    def __init__(self, rows, rest=0):
        super().__init__({}, rest)
        blocks = rows["row_0"]
        self.groups = nn.ModuleList(nn.ModuleList(blocks[i : i + 2]) for i in range(0, 8, 2))

    def forward(self, x):
        x = self.first(x)
        for group in self.groups:
            for block in group:
                x = block(x)
        return x


class TiedBlocks(Stack):
    """Two blocks share their weights."""

    def __init__(self, rows, rest=0):
        super().__init__(rows, rest)
        self.row_0[5].up.weight = self.row_0[1].up.weight


class TiedToRest(Stack):
    """A block shares a weight with what is outside of the blocks."""

    def __init__(self, rows, rest=0):
        super().__init__(rows, rest)
        self.head = nn.Linear(WIDTH, self.row_0[3].up.out_features)
        self.head.weight = self.row_0[3].up.weight

    def forward(self, x):
        x = super().forward(x)
        return x + torch.tanh(self.head(x)).mean(-1, keepdim=True)


class SameTwice(Stack):
    """One block stands in the row twice."""

    def __init__(self, rows, rest=0):
        super().__init__(rows, rest)
        self.row_0[6] = self.row_0[2]


class Bare(nn.Sequential):
    """Blocks and nothing else: there is no rest."""

    def __init__(self, rows, rest=0):
        super().__init__(*rows["row_0"])

    device = property(lambda self: self[0].up.weight.device)
    dtype = property(lambda self: self[0].up.weight.dtype)


class InParallel(Stack):
    """The second half of the blocks runs on a stream of its own."""

    def forward(self, x):
        if x.device.type == "cpu":
            return super().forward(x)
        x = self.first(x)
        for block in self.row_0[:4]:
            x = block(x)
        begun = x  # it must live until the stream that frees it has waited
        main = torch.accelerator.current_stream()
        side = torch.Stream(device=x.device)
        begin, end = torch.Event(device=x.device), torch.Event(device=x.device)
        begin.record(main)
        side.wait_event(begin)
        with side:
            for block in self.row_0[4:]:
                x = block(x)
            end.record(side)
        main.wait_event(end)
        x.record_stream(main)
        return begun * 0 + x


KINDS = (
    Stack,
    Twice,
    Conditional,
    Shuffled,
    Remembering,
    ByMethod,
    ByPart,
    ByEntryMethod,
    Nested,
    TiedBlocks,
    TiedToRest,
    SameTwice,
    Bare,
    InParallel,
)
BLOCKS = {ByMethod: OtherMethod, ByEntryMethod: Encoding}


def special(kind):
    """`SMALL` with a transformer of another kind."""
    pipe = build(SMALL)
    block = BLOCKS.get(kind, Block)
    row = [block(25_000, 0.02, 1000) for _ in range(8)]
    pipe.transformer = kind({"row_0": row}, 5000).eval()
    return pipe


def next_step(pipe, step):
    pipe.transformer.step = (step + 1) % 4


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_may_be_used_in_any_way(sim_device, kind):
    pipe, x = special(kind), noise()
    expected = unoffloaded(pipe, x, on_step=next_step)
    engine = streamed(pipe)
    for _ in range(4):
        torch.accelerator.reset_peak_memory_stats()
        call = measured(lambda: pipe(x, on_step=next_step))
        check(call, expected, engine)
    blocks = [name for name in engine._residency.units if name.startswith("transformer.")]
    assert len(blocks) >= 6
    engine.detach()
    assert torch.equal(pipe(x.cpu(), on_step=next_step), expected.output)


def test_some_of_a_block_stays_while_the_rest_of_it_streams(sim_device):
    pipe, x = build(SMALL), noise()
    expected = unoffloaded(pipe, x)
    engine = streamed(pipe)
    for _ in range(3):
        check(measured(lambda: pipe(x)), expected, engine)
    fetched = {name for step in engine.plan.steps for name in step.fetch}
    blocks = [unit for unit in engine._residency.units.values() if unit.parts]
    assert len(blocks) == 4 + 8 + 4
    divided = [
        unit for unit in blocks if 0 < len(fetched & {u.name for u in (unit, *unit.parts)}) < 4
    ]
    assert divided


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_layer_of_a_block_may_be_called_by_hand(sim_device, when):
    """It enters the block that it is in, parts and all."""
    pipe, x = build(SMALL), noise()
    layer = pipe.transformer.row_0[2].down_2
    given = torch.randn(2, layer.in_features)
    output, by_hand = unoffloaded(pipe, x).output, layer(given)
    engine = streamed(pipe)
    if when != "before":
        pipe(x)
    if when == "after":
        pipe(x)
    torch.testing.assert_close(layer(given), by_hand)
    for _ in range(3):
        assert torch.equal(pipe(x), output)
    engine.detach()
    assert torch.equal(pipe(x), output)


@pytest.mark.parametrize("kind", [Conditional, Shuffled])
def test_a_call_that_runs_other_blocks_than_the_one_before_is_right(sim_device, kind):
    pipe, x = special(kind), noise()
    plain = copy.deepcopy(pipe).to(sim_device)
    engine = streamed(pipe)
    sim.configure(capacity_nbytes=10 * engine.vram_nbytes)  # for `plain`
    for number in range(6):

        def other(pipe, step, number=number):
            pipe.transformer.step = (step * number + 1) % 4

        pipe.transformer.step = plain.transformer.step = 1
        expected = plain(x, on_step=other)
        torch.accelerator.reset_peak_memory_stats()
        call = measured(lambda: pipe(x, on_step=other))
        assert torch.equal(call.output, expected)
        assert call.peak_nbytes <= engine.vram_nbytes + weights_nbytes(plain)


def test_a_call_with_other_arguments_than_the_one_before_is_right(sim_device):
    """More steps, fewer steps, larger inputs: what the plan does not know."""
    pipe = build(SMALL)
    calls = [(rows, steps) for rows in (2, 40) for steps in (4, 1, 7)]
    expected = {
        call: unoffloaded(pipe, noise(call[0]), num_inference_steps=call[1]) for call in calls
    }
    engine = streamed(pipe)
    for call in (*calls, *calls[::-2]):
        torch.accelerator.reset_peak_memory_stats()
        rows, steps = call
        got = measured(lambda rows=rows, steps=steps: pipe(noise(rows), steps))
        check(got, expected[call], engine)


class Keeping(Streamed):
    """Each step keeps something that lives to the end of the next."""

    @torch.no_grad()
    def __call__(self, x, num_inference_steps=4):
        x, kept = self.te(x.to(self._execution_device)), None
        for _ in range(num_inference_steps):
            x = self.transformer(x)
            kept = x.new_full((1500,), 0.5)
            x = x + kept.mean()
        del kept
        return self.vae(x).cpu()


@pytest.mark.parametrize("fraction", [0.4, 0.7])
def test_what_a_step_keeps_for_the_next_counts_in_the_plan(sim_device, caplog, fraction):
    small = build(SMALL)
    pipe, x = Keeping(small.te, small.transformer, small.vae), noise()
    expected = unoffloaded(pipe, x)
    engine = streamed(pipe, fraction)
    for number in range(5):
        torch.accelerator.reset_peak_memory_stats()
        call = measured(lambda: pipe(x))
        check(call, expected, engine)
        if number:
            plan = engine._planner.plan_of_last_call
            assert abs(call.moved.h2d_nbytes - x.nbytes - plan.fetched_nbytes) <= 16
            assert call.seconds == pytest.approx(plan.seconds, rel=0.02)
    assert not [r for r in caplog.records if r.name.startswith("offload_engine")]


class TwoWays(Stack):
    """Encodes much in little memory, and decodes little in much."""

    def encode(self, x):
        return self.row_0[0](x)

    def decode(self, x):
        return super().forward(x) + x.new_zeros(10_000).sum()


class Editing(Streamed):
    """Image to image: the autoencoder runs at both ends."""

    @torch.no_grad()
    def __call__(self, x, num_inference_steps=2):
        x = self.vae.encode(x.to(self._execution_device))[:1]
        x = self.te(x)
        for _ in range(num_inference_steps):
            x = self.transformer(x)
        return self.vae.decode(x).cpu()


def test_decoding_is_not_taken_for_the_encoding_before_it(sim_device, caplog):
    small = build(SMALL)
    vae = TwoWays({"row_0": [Block(5000) for _ in range(4)]}, 5000).eval()
    pipe, x = Editing(small.te, small.transformer, vae), noise(4)
    expected = unoffloaded(pipe, x)
    engine = streamed(pipe, 0.4)
    for _ in range(4):
        torch.accelerator.reset_peak_memory_stats()
        check(measured(lambda: pipe(x)), expected, engine)
    assert not [r for r in caplog.records if r.name.startswith("offload_engine")]


# Not Qwen-Image: a cache of diffusers keeps its rotary embeddings on the device for good.
REAL = ("sdxl", "sd15", "sd3", "flux_true_cfg", "wan22_i2v", "sdxl_img2img")


@pytest.mark.parametrize("name", REAL)
def test_real_pipelines_stream_as_planned(sim_device, caplog, name):
    case, steps = PIPELINES[name], 3
    pipe = case.build("tiny").to(sim_device)
    torch.accelerator.reset_peak_memory_stats()
    expected = measured(lambda: case.run(pipe, steps))
    del pipe
    gc.collect()
    pipe = case.build("tiny")
    budget = expected.peak_nbytes - weights_nbytes(pipe) // 2
    engine = offload_engine.attach(pipe, case.seq, vram=budget)
    sim.configure(h2d_bandwidth=2e9, pageable_bandwidth=2e9, capacity_nbytes=budget)
    for number in range(5):
        torch.accelerator.reset_peak_memory_stats()
        call = measured(lambda: case.run(pipe, steps))
        check(call, expected, engine)
        assert call.moved.host_syncs <= expected.moved.host_syncs + 2
        if number >= 3:  # by then the plan is settled
            plan = engine._planner.plan_of_last_call
            copied = call.moved.h2d_nbytes - expected.moved.h2d_nbytes
            assert copied == pytest.approx(plan.fetched_nbytes, rel=0.001)
            assert call.seconds == pytest.approx(plan.seconds, rel=0.02)
            assert call.seconds <= 1.1 * plan.bound_seconds
    assert not [r for r in caplog.records if r.name.startswith("offload_engine")]


# ---- compiled


def test_the_repeated_blocks_of_flux_are_compiled_once_each(sim_device, fresh_dynamo):
    case, pipe = PIPELINES["flux"], copy.deepcopy(deep_flux()).to(sim_device)
    torch.accelerator.reset_peak_memory_stats()
    expected = measured(lambda: case.run(pipe, 2))
    pipe.to("cpu")
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    budget = expected.peak_nbytes - weights_nbytes(pipe) // 2
    engine = offload_engine.attach(pipe, vram=budget)
    sim.configure(capacity_nbytes=budget, h2d_bandwidth=2e9, pageable_bandwidth=2e9)
    for _ in range(4):
        torch.accelerator.reset_peak_memory_stats()
        call = measured(lambda: case.run(pipe, 2))
        check(call, expected, engine)
        assert fresh_dynamo["stats"]["unique_graphs"] <= 2 * 2  # two kinds of blocks
    plan = engine._planner.plan_of_last_call
    assert [mark.unit for mark in engine._meter.marks] == [use.segments[-1] for use in plan.uses]
    assert call.seconds == pytest.approx(plan.seconds, rel=0.02)


@pytest.mark.parametrize(
    ("backend", "when"), [("eager", "before"), ("eager", "after"), ("aot_eager", "before")]
)
@pytest.mark.parametrize("what", ["transformer", "blocks"])
def test_what_is_compiled_streams_and_is_compiled_a_few_times_only(
    sim_device, fresh_dynamo, what, backend, when
):
    pipe, x = build(SMALL), noise()
    for part in (pipe.te, pipe.transformer, pipe.vae):
        for module in part.modules():
            module.seconds = 0.0  # dynamo cannot trace into the simulator
    expected = unoffloaded(pipe, x)

    def compile_it():
        modules = [pipe.transformer] if what == "transformer" else pipe.transformer.row_0
        for module in modules:
            module.compile(backend=backend)

    if when == "before":
        compile_it()
    engine = streamed(pipe)
    if when == "after":
        pipe(x)
        compile_it()
    graphs = []
    for _ in range(5):
        torch.accelerator.reset_peak_memory_stats()
        call = measured(lambda: pipe(x))
        assert torch.equal(call.output, expected.output)
        assert call.peak_nbytes <= engine.vram_nbytes
        graphs.append(fresh_dynamo["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1]
    plan = engine._planner.plan_of_last_call
    assert [mark.unit for mark in engine._meter.marks] == [use.segments[-1] for use in plan.uses]
    assert abs(call.moved.h2d_nbytes - x.nbytes - plan.fetched_nbytes) <= 16
    assert graphs[-1] <= (2 if what == "blocks" else 2 * 8 + 2)


# ---- what a call needs that the one before did not show


class Remembering(Streamed):
    """Has the result of the last step beside the next one, as diffusers' pipelines do; its decoder
    encodes as well, which is more work and takes less room."""

    @torch.no_grad()
    def __call__(self, x, num_inference_steps=4, passes=1):
        x = x.to(self._execution_device)
        x = self.vae.encode(x)
        large = x.new_zeros(RESULT, WIDTH) + x[:1]
        seen = None
        for _ in range(num_inference_steps * passes):
            seen = self.transformer(large)
            large = large - 0.1 * seen
        del seen
        x = self.vae.decode(large[:2])
        self.maybe_free_model_hooks()
        return x.cpu()


class Coder(Stack):
    def encode(self, x):
        return self(x.repeat(4, 1))[:2]

    def decode(self, x):
        return self(x) + x.new_zeros(ROOM // 4).sum()


RESULT, ROOM = 80, 30_000
CALLS = ((2, 4, 1, 3), (3, 1, 2), (1, 3, 3, 1, 4), (2, -2, 2, 2))  # steps; below 0: passes twice


@pytest.mark.parametrize("resets", [True, False], ids=["peak reset", "peak kept"])
@pytest.mark.parametrize("steps", CALLS)
def test_calls_of_any_length_stay_within_the_budget(sim_device, steps, resets):
    torch.manual_seed(0)
    vae = Coder({"row_0": [Block(5_000) for _ in range(4)]}, 5_000)
    stack = Stack({"row_0": [Block(25_000) for _ in range(8)]}, 5_000)
    pipe, x = Remembering(Stack({}, 5_000), stack.eval(), vae.eval()), noise()
    plain = copy.deepcopy(pipe).to(sim_device)
    calls = [{"num_inference_steps": abs(n), "passes": 1 if n > 0 else 2} for n in steps]
    expected = [plain(x, **call) for call in calls]
    del plain
    gc.collect()
    with streamed(pipe, 0.55) as engine:
        for call, output in zip(calls, expected, strict=True):
            if resets:
                torch.accelerator.reset_peak_memory_stats()
            assert torch.equal(pipe(x, **call), output)
            assert torch.accelerator.max_memory_allocated() <= engine.vram_nbytes


def test_after_activations_have_grown_one_call_fails_at_most(sim_device):
    """What is known of one unit is known of the others no more."""
    pipe, x = build(SMALL), noise()
    engine = streamed(pipe, 0.6)
    for _ in range(3):
        pipe(x)
    for block in (*pipe.te.row_0, *pipe.transformer.row_0, *pipe.vae.row_0):
        block.scratch += 8_000
    sim.configure(capacity_nbytes=10**7)
    expected = unoffloaded(copy.deepcopy(pipe), x)
    sim.configure(capacity_nbytes=engine.vram_nbytes)
    with contextlib.suppress(torch.OutOfMemoryError):
        pipe(x)
    for _ in range(4):
        assert torch.equal(pipe(x), expected.output)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x):
        return torch.tanh(x + self.attention(x, x, x, need_weights=False)[0])


def test_torchs_own_attention_has_the_same_bits_in_inference_mode(sim_device):
    """It leaves its fast path below a mode: so it is not watched."""
    torch.manual_seed(0)
    pipe, x = build(SMALL), torch.randn(2, 64, WIDTH)
    pipe.transformer.row_0 = nn.ModuleList(Attending() for _ in range(8)).eval()
    with torch.inference_mode():
        expected = unoffloaded(pipe, x)
        with streamed(pipe, 0.9):
            sim.configure(capacity_nbytes=10**7)
            for _ in range(3):
                assert torch.equal(pipe(x), expected.output)
