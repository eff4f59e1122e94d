"""The numbers that must stay reached, as bytes, counts and simulated time, never as wall time; and
that the benchmarks run. (Beside accelerate: tests/interop/test_memory.py.)"""

import functools
import gc
import json
import sys
import time

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import offload_engine
from benchmarks import attaching, children, fast_path, gpu_run, growth, models, movement, noticing
from offload_engine import sim

LINK = 24e9  # bytes per second: what the simulated device has unless it is told otherwise
# What runs twice: the vae; the encoders, once for each prompt.
ONCE_OR_MORE = {"img2img": 1.1, "sd3": 1.42}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """One thread, as models this small lose by a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


measured = functools.cache(movement.measure)


@pytest.mark.parametrize("name", movement.CASES)
def test_offloading_costs_the_weights_once_up_nothing_down_and_the_time_of_the_link(
    sim_device, name
):
    none, ours = measured(name, "no offload"), measured(name, "this engine")
    assert torch.equal(ours.output, none.output)
    assert max(ours.first_peak_nbytes, ours.peak_nbytes) < none.peak_nbytes
    assert ours.d2h_nbytes == none.d2h_nbytes
    assert ours.d2h_copies == none.d2h_copies
    up = ours.h2d_nbytes - none.h2d_nbytes
    assert up <= ONCE_OR_MORE.get(name, 1.02) * ours.weights_nbytes  # alignment is 2 % when tiny
    assert ours.h2d_copies <= none.h2d_copies + 8  # one for each fetch of a component
    assert ours.pageable_copies <= none.pageable_copies
    assert ours.host_syncs <= none.host_syncs + 1  # before the masters may be written again
    assert ours.seconds <= none.seconds + up / LINK + 2e-5 * ours.h2d_copies


@pytest.mark.parametrize("masters", attaching.MASTERS)
def test_attaching_raises_host_memory_by_a_tenth_of_the_weights_at_most(sim_device, masters):
    found = attaching.measure(2**28, masters)
    assert found.part(found.attach_peak_nbytes) <= 0.10
    assert found.part(found.attached_nbytes) <= 0.03
    assert found.part(found.detached_nbytes) <= 0.03
    assert found.pinned_nbytes <= 1.01 * found.weights_nbytes
    assert (found.left_pinned_nbytes, found.left_device_nbytes) == (0, 0)
    assert found.unchanged


class Small(DiffusionPipeline):
    model_cpu_offload_seq = "te->unet->vae"

    def __init__(self, te, unet, vae):
        super().__init__()
        self.register_modules(te=te, unet=unet, vae=vae)

    @torch.no_grad()
    def __call__(self, x):
        x = torch.tanh(self.te(x.to(self._execution_device)))
        for _ in range(3):
            x = torch.tanh(self.unet(x))
        x = self.vae(x).cpu()
        self.maybe_free_model_hooks()
        return x


def test_two_hundred_calls_leave_nothing_behind(sim_device):
    widths = {"te": 96, "unet": 512, "vae": 160}
    parts = {n: nn.Sequential(nn.Linear(64, w), nn.Linear(w, 64)) for n, w in widths.items()}
    pipe, x = Small(**parts), torch.randn(4, 64)
    with offload_engine.attach(pipe):
        grown = growth.measure(lambda: pipe(x), sim_device, calls=200)
    for name in ("allocated_nbytes", "reserved_nbytes", "peak_nbytes", "pinned_nbytes"):
        assert grown.of(name) == 0, name
    assert grown.of("rss_nbytes") < 4 * 2**20
    assert grown.of("objects") < 200
    assert not sim.violations()


@pytest.fixture
def denoiser(sim_device):
    """All 1,680 tensors of SDXL's denoiser, small; with its engine."""
    unet = models.sdxl_unet(**models.NARROW_UNET)
    pipe = noticing._Components(unet=unet)
    models.materialise(pipe, torch.device("cpu"), torch.float32, lambda drawn: drawn)
    engine = offload_engine.attach(pipe.components, "unet")
    yield engine, engine._mounts["unet"].unit
    engine.detach()


def test_noticing_that_nothing_changed_moves_no_byte_and_waits_for_nothing(denoiser):
    engine, unit = denoiser
    assert len(unit._weights) == 1680
    engine._residency.enter(unit, ())
    before = sim.counters()
    engine._residency.release(unit)
    moved = sim.counters().since(before)
    assert (moved.h2d_copies, moved.d2h_copies, moved.d2d_nbytes, moved.host_syncs) == (0, 0, 0, 0)
    engine._residency.enter(unit, ())
    moved = sim.counters().since(before)
    assert (moved.h2d_copies, moved.d2h_copies, moved.host_syncs) == (1, 0, 0)
    assert moved.h2d_nbytes == unit.nbytes


def test_a_forward_on_the_device_runs_two_functions_of_the_engine_at_most(sim_device):
    denoisers = [fast_path._denoiser(sim_device, name, fast_path.ENGINE) for name in ("sdxl",)]
    x, called = torch.zeros(1, device=sim_device), []

    def note(frame, event, argument):
        if event == "call" and "/offload_engine/" in frame.f_code.co_filename:
            called.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else "")

    for module in denoisers:
        module(x, x)
        sys.setprofile(note)
        module(x, x)
        sys.setprofile(None)
        assert len(called) <= 2, called


def test_the_measurements_of_the_benchmarks_run(sim_device):
    speed = fast_path.measure(sim_device, "flux", rounds=2, calls=2)
    assert "this engine" in fast_path.show([speed])
    cost = noticing.measure(sim_device, rounds=1)
    assert cost.tensors == 1680 and cost.nbytes == 2 * 2_567_463_684
    assert "the fetch it protects" in noticing.show(cost)
    json.dumps([speed.to_dict(), cost.to_dict()])


def test_random_weights_are_the_same_wherever_they_are_put_and_ties_are_kept(sim_device):
    pipes = [models.model("flux", tiny=True).build() for _ in range(2)]
    for pipe, place in zip(pipes, (lambda drawn: drawn, models.ToHost(2**10)), strict=True):
        models.materialise(pipe, sim_device, torch.bfloat16, place)
        encoder = pipe.text_encoder_2
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    left, right = (pipe.transformer.state_dict() for pipe in pipes)
    assert all(torch.equal(left[name].cpu(), right[name]) for name in left)


def test_copies_in_a_profile_are_summed_by_direction_and_kind():
    def copy(name, nbytes, dur):
        return {"ph": "X", "cat": "gpu_memcpy", "name": name, "dur": dur, "args": {"bytes": nbytes}}

    events = [
        copy("Memcpy HtoD (Pinned -> Device)", 1000, 10.0),
        copy("Memcpy HtoD (Pageable -> Device)", 24, 2.0),
        copy("Memcpy DtoH (Device -> Pageable)", 8, 1.0),
        {"ph": "X", "name": "gemm", "dur": 5.0, "args": {}},
        {"ph": "M", "name": "process_name"},
    ]
    sums = gpu_run.sum_copies(events)
    assert sums["HtoD"] == {"nbytes": 1024, "copies": 2, "seconds": pytest.approx(12e-6)}
    assert sums["HtoD Pinned"]["nbytes"] == 1000
    assert sums["DtoH Pageable"]["copies"] == 1
    assert "unknown" in gpu_run.sum_copies([])


def test_a_child_that_runs_out_of_time_is_ended_and_what_it_found_counts(tmp_path):
    said = children._run([sys.executable, "-uc", "import time; print(7); time.sleep(60)"], 2.0)
    assert said.splitlines() == ["7", "ended after 2 s"]
    record = gpu_run.Record(tmp_path / "result.json", found=1)
    with pytest.raises(ZeroDivisionError), record.step("divide"):
        raise ZeroDivisionError
    assert json.loads((tmp_path / "result.json").read_text()) == {"found": 1, "under_way": "divide"}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The GPU benchmark, small and on the simulated device: the same code in the same processes."""
    from benchmarks import gpu

    results = tmp_path_factory.mktemp("results")
    arguments = ["--device", "sim", "--tiny", "--results", str(results), "--budget", "300"]
    arguments += ["--sdxl-steps", "2", "--flux-steps", "2"]
    arguments += ["--sdxl-requests", "1", "--flux-requests", "1"]
    arguments += ["--ways", "this engine", "no offload"]
    assert gpu.main(arguments) == 0
    (path,) = results.iterdir()
    return path, json.loads(path.read_text())


def test_the_gpu_benchmark_writes_where_its_numbers_come_from(sim_device, dry_run):
    path, result = dry_run
    assert path.name == f"sim-{result['date'][:10]}-{result['commit']}.json"
    assert {"commit", "command", "versions", "cpu", "options", "machine", "runs"} <= set(result)
    assert not [name for name in result["machine"] if name.endswith("failed")]
    assert {"hardware", "link", "pinning", "copying", "noticing"} <= set(result["machine"])
    bandwidths = {r["kind"]: r["bandwidth"] for r in result["machine"]["link"]}
    assert bandwidths["pinned"] == pytest.approx(LINK, rel=0.01)


def test_the_gpu_benchmark_compares_its_runs(sim_device, dry_run):
    runs = {(run["model"], run["way"]): run for run in dry_run[1]["runs"]}
    assert not [run["failed"] for run in runs.values() if "failed" in run]
    for model in ("sdxl", "flux"):
        ours, none = runs[model, "this engine"], runs[model, "no offload"]
        assert none["same_bits"] and none["is_finite"]
        assert ours["requests"][0]["peak_allocated_nbytes"] < sum(ours["weights_nbytes"].values())
        assert ours["traffic"]["DtoH"] == none["traffic"]["DtoH"]
        assert ours["left_on_device_nbytes"] == 0
        assert ours["left_allocated_nbytes"] < 1024  # the timesteps of the scheduler
        assert ours["report"]["components"]["vae"]["fetches"] == 1
        assert sum(ours["allocator"].values()) == 0 or ours["growth"]


def test_the_gpu_benchmark_says_what_does_not_fit(sim_device, tmp_path):
    arguments = ["--model", "flux", "--way", "no offload", "--device", "sim", "--tiny"]
    arguments += ["--cap-gib", "0.001", "--deadline", str(time.time() + 100)]
    found = children.run_child("benchmarks.gpu_run", *arguments, "--image", str(tmp_path / "i.npy"))
    assert "must be on the device at once" in found["skipped"]


def test_without_a_gpu_the_gpu_benchmark_says_so(capsys):
    from benchmarks import gpu

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()
