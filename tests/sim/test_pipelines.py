"""Every pipeline of benchmarks/pipelines, on the simulated accelerator: the same bits as without
offload, weights to the device as often as the uses ask for it, and never back."""

import functools
from typing import NamedTuple

import pytest
import torch

import offload_engine
from benchmarks.pipelines import PIPELINES, modules
from offload_engine import sim

STEPS = 2
CALLS = 2
EXTRA_FETCHES = 4  # of the first call of a pipeline that alternates, at most

each_case = pytest.mark.parametrize("case", PIPELINES.values(), ids=PIPELINES)

# Where a pipeline asks a component, not itself, on which device to prepare inputs, the answer is
# the host while that component is offloaded: what it prepares there travels once more.
INPUTS_PREPARED_ON_THE_HOST = {
    "stable_audio": "projection_model.device",
    "ideogram4": "text_encoder.device, and calls its layers one by one",
    "flux2": "vae.bn.running_mean",
    "flux2_generate": "vae.bn.running_mean",
}


class Call(NamedTuple):
    output: torch.Tensor
    moved: sim.Counters


def call(case, pipe):
    before = sim.counters()
    output = torch.as_tensor(case.run(pipe, steps=STEPS))
    return Call(output, sim.counters().since(before))


@functools.cache
def without_offload(name):
    """Two calls of the same pipeline with everything on the simulated device."""
    pipe = PIPELINES[name].build()
    pipe.to("sim")
    return [call(PIPELINES[name], pipe) for _ in range(CALLS)]


def by_unit(engine):
    """The report of the last call, with components that move as one counted once."""
    components = engine.report().components
    return {engine._mounts[name].unit.name: component for name, component in components.items()}


def stages_with(sequence, name):
    return sum(name in stage for stage in sequence.stages)


@each_case
def test_the_bits_are_those_of_the_same_pipeline_without_offload(sim_device, case):
    expected = without_offload(case.name)
    pipe = case.build()
    engine = offload_engine.attach(pipe, case.seq)
    excluded = modules(pipe).keys() & set(getattr(pipe, "_exclude_from_cpu_offload", ()))
    for each in expected:
        assert torch.equal(call(case, pipe).output, each.output)
        assert set(engine.resident) == excluded - set(engine.sequence.names)
    assert not sim.violations()


@each_case
def test_weights_move_as_often_as_the_uses_ask_and_never_back(sim_device, case):
    expected = without_offload(case.name)
    pipe = case.build()
    engine = offload_engine.attach(pipe, case.seq)
    for number, own in enumerate(expected):
        ours = call(case, pipe)
        units = by_unit(engine)
        weights_nbytes = sum(unit.fetches * unit.nbytes for unit in units.values())
        if case.name not in INPUTS_PREPARED_ON_THE_HOST:
            assert ours.moved.h2d_nbytes == weights_nbytes + own.moved.h2d_nbytes
            assert ours.moved.d2h_nbytes == own.moved.d2h_nbytes
            assert ours.moved.pageable_copies == own.moved.pageable_copies
            assert ours.moved.host_syncs <= own.moved.host_syncs + 1  # the end of the call
        assert not any(unit.write_back_nbytes for unit in units.values())
        assert all(unit.fetched_nbytes == unit.fetches * unit.nbytes for unit in units.values())
        extra = {
            name: unit.fetches - stages_with(engine.sequence, name) for name, unit in units.items()
        }
        assert min(extra.values()) >= 0
        assert sum(extra.values()) <= (EXTRA_FETCHES if number == 0 else 0)


@each_case
def test_a_component_that_a_call_does_not_run_is_not_fetched(sim_device, case):
    pipe = case.build()
    engine = offload_engine.attach(pipe, case.seq)
    call(case, pipe)
    components = engine.report().components
    assert {name for name, c in components.items() if c.fetches == 0} == set(case.unused)
    assert set(engine.sequence.names) <= set(components) - set(case.unused)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "wan_t2v"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gives_the_same_bits_too(sim_device, name, dtype):
    """SDXL casts its vae to float32 and back in the middle of each call."""
    case = PIPELINES[name]
    on_device = case.build(dtype=dtype)
    on_device.to("sim")
    expected = [call(case, on_device).output for _ in range(CALLS)]
    pipe = case.build(dtype=dtype)
    engine = offload_engine.attach(pipe, case.seq)
    for each in expected:
        assert torch.equal(call(case, pipe).output, each)
        assert engine.resident == ()
