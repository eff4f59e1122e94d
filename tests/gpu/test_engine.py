"""The engine on a real GPU: the scenarios of tests/sim, and what only CUDA can show.

`make test-gpu`. Run them also with TORCH_CUDA_SANITIZER=1.
"""

import gc

import pytest
import torch
from torch import nn

import offload_engine
import offload_engine.host_store
from benchmarks.pipelines import PIPELINES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(autouse=True)
def deterministic():
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def modules():
    torch.manual_seed(0)
    sizes = {"te": 1024, "unet": 8192, "vae": 2048}
    return {n: nn.Sequential(nn.Linear(1024, s), nn.Linear(s, 1024)) for n, s in sizes.items()}


@pytest.fixture
def x():
    return torch.randn(8, 1024, generator=torch.Generator().manual_seed(1)).cuda()


@torch.no_grad()
def run(modules, x):
    for module in modules.values():
        x = torch.tanh(module(x))
    return x


def nbytes_of(module):
    return sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan_t2v", "sd15_controlnet"])
def test_the_output_is_bit_identical_to_no_offload(name):
    case = PIPELINES[name]
    pipe = case.build().to("cuda")
    expected = torch.as_tensor(case.run(pipe, steps=2))
    pipe.to("cpu")
    engine = offload_engine.attach(pipe, case.seq)
    for _ in range(2):
        assert torch.equal(torch.as_tensor(case.run(pipe, steps=2)), expected)
        assert engine.resident == ()


def test_one_component_at_a_time_takes_device_memory(modules, x):
    engine = offload_engine.attach(modules, "te->unet->vae")
    base = torch.cuda.memory_allocated()
    for name, module in modules.items():
        with torch.no_grad():
            module(x)
        assert engine.resident == (name,)
        held = torch.cuda.memory_allocated() - base
        assert nbytes_of(module) <= held < nbytes_of(module) + 2**20
    engine.release()
    assert torch.cuda.memory_allocated() == base


def test_masters_are_pinned_and_exactly_as_large_as_the_weights(modules):
    offload_engine.attach(modules, "te->unet->vae")
    for module in modules.values():
        assert all(p.is_pinned() for p in module.parameters())
    held = offload_engine.host_store.HostStore.pinned_nbytes
    assert held <= 1.001 * sum(map(nbytes_of, modules.values())) + 4096


def test_a_registration_that_fails_leaves_no_error_behind(modules, x, caplog):
    from offload_engine.host_store import HostStore, cuda_registrar, register

    store = HostStore(torch.device("cuda", 0))
    block = store.allocate(2**20)
    undo = register(block.flat, cuda_registrar(store.device))
    store.seal(block)  # registered twice: the driver refuses
    assert not block.pinned and "Could not pin" in caplog.text
    assert (x + 1).sum().isfinite()
    torch.cuda.synchronize()
    undo()


def test_a_fetch_runs_at_the_speed_of_a_link(modules, x):
    engine = offload_engine.attach(modules, "te->unet->vae")
    for _ in range(3):
        run(modules, x)
    report = engine.report().components["unet"]
    assert report.fetch_seconds > 0
    assert 1e9 < report.fetched_nbytes / report.fetch_seconds < 500e9


def test_changes_on_the_device_survive(modules, x):
    twin = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in modules["te"]))
    twin.load_state_dict(modules["te"].state_dict())
    twin.cuda()
    offload_engine.attach(modules, "te->unet->vae")
    edits = (
        lambda m: m[0].weight.data.add_(0.5),
        lambda m: m[0].weight.mul_(2),
        lambda m: setattr(m[1].weight, "data", m[1].weight.data * 3),
    )
    with torch.no_grad():
        for edit in edits:
            modules["te"](x)
            edit(modules["te"]), edit(twin)
            modules["unet"](x)
            assert torch.equal(modules["te"](x), twin(x))
            modules["unet"](x)


def test_a_side_stream_reads_whole_weights_and_its_slot_is_not_reused_early(modules, x):
    expected = run({n: m.cuda() for n, m in modules.items()}, x)
    for module in modules.values():
        module.cpu()
    offload_engine.attach(modules, "te->unet->vae")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(side):
            assert torch.equal(run(modules, x), expected)
        assert torch.equal(run(modules, x), expected)


def test_an_exception_costs_no_memory(x):
    case = PIPELINES["sdxl"]
    pipe = case.build()
    engine = offload_engine.attach(pipe)
    case.run(pipe, steps=2)
    base = torch.cuda.memory_allocated()

    def callback(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            case.run(pipe, steps=2, callback_on_step_end=callback)
        gc.collect()
        assert engine.resident == () and torch.cuda.memory_allocated() <= base + 2**20
    case.run(pipe, steps=2)


def test_out_of_memory_names_the_component_and_the_next_call_works(modules, x):
    engine = offload_engine.attach(modules, "te->unet->vae")
    run(modules, x)
    engine.release()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + nbytes_of(modules["unet"]) // 2
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="unet needs"):
            run(modules, x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    run(modules, x)


def test_fifty_rounds_do_not_grow(modules, x):
    engine = offload_engine.attach(modules, "te->unet->vae")
    for _ in range(5):
        run(modules, x)
    engine.release()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(50):
        run(modules, x)
    engine.release()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert after[0] == before[0] and after[1] <= before[1]


def test_detach_gives_pinned_and_device_memory_back(modules, x):
    expected = run({n: m.cuda() for n, m in modules.items()}, x).cpu()
    for module in modules.values():
        module.cpu()
    gc.collect()
    pinned, device = (
        offload_engine.host_store.HostStore.pinned_nbytes,
        torch.cuda.memory_allocated(),
    )
    engine = offload_engine.attach(modules, "te->unet->vae")
    run(modules, x)
    engine.detach()
    gc.collect()
    assert offload_engine.host_store.HostStore.pinned_nbytes == pinned
    assert torch.cuda.memory_allocated() == device
    assert not any(p.is_pinned() for m in modules.values() for p in m.parameters())
    assert torch.equal(run({n: m.cuda() for n, m in modules.items()}, x).cpu(), expected)
