"""Real diffusers pipelines, small: the bits are those of everything on the GPU; nothing is left."""

import pytest
import torch

import offload_engine
from benchmarks import models
from benchmarks.ways import WAYS, why_missing

from .conftest import allocated, clean

NAMES = (
    "sd15",
    "sdxl",
    "sd3",
    "flux",
    "wan_t2v",
    "stable_audio",
    "sdxl_img2img",
    "sdxl_controlnet",
)


def build(name, dtype):
    """The pipeline and its case; skips where these versions of the libraries cannot build it."""
    try:
        from benchmarks.pipelines import PIPELINES

        return PIPELINES[name], PIPELINES[name].build("tiny", dtype)
    except (ImportError, TypeError) as error:
        pytest.skip(f"{name} needs other versions of diffusers or transformers: {error}")


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_those_without_offload(device, name):
    case, pipe = build(name, torch.float32)
    pipe.to(device)
    expected = [torch.as_tensor(case.run(pipe, 2)) for _ in range(2)]
    if not torch.equal(*expected):
        pytest.skip(f"{name} gives other bits at each run on this device, also without offload")
    pipe.to("cpu")
    clean()
    engine = offload_engine.attach(pipe, case.seq, device=device)
    left = []
    for _ in range(3):
        assert torch.equal(torch.as_tensor(case.run(pipe, 2)), expected[0])
        assert engine.resident == ()
        left.append(allocated())
    assert left[1] == left[2]
    engine.detach()


@pytest.mark.parametrize("name", ["sdxl", "flux"])
@pytest.mark.parametrize("way", ["this engine", "pinned chain", "accelerate"])
def test_every_way_that_the_benchmark_compares_makes_the_same_image(device, name, way):
    if why_missing(way) is not None:
        pytest.skip(why_missing(way))
    model = models.model(name, tiny=True)
    images = []
    for each in ("no offload", way):
        pipe = model.build()
        pipe.set_progress_bar_config(disable=True)
        models.materialise(pipe, device, torch.bfloat16, models.ToHost(2**16))
        placed = WAYS[each](pipe, device)
        images += [model.request(pipe, 2) for _ in range(2)]
        placed.detach()
    assert images[0].isfinite().all() and images[0].std() > 0
    assert all(torch.equal(image, images[0]) for image in images)


def test_half_precision_and_inference_mode(device):
    case, resident = build("sdxl", torch.float16)
    _, offloaded = build("sdxl", torch.float16)
    resident.to(device)
    with torch.inference_mode():
        expected = [torch.as_tensor(case.run(resident, 2)) for _ in range(2)]
    del resident
    clean()
    with offload_engine.attach(offloaded, device=device), torch.inference_mode():
        for image in expected:
            assert torch.equal(torch.as_tensor(case.run(offloaded, 2)), image)
