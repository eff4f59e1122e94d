"""Beside accelerate's enable_model_cpu_offload, in one process on one simulated device: the same
bits, no more device memory, less traffic."""

from typing import NamedTuple

import pytest
import torch

import offload_engine
from offload_engine import sim

from .conftest import Meter, build, run

CALLS = 2
LINEAR = ["sd15", "wan_t2v", "wan22_t2v", "flux", "stable_audio"]  # each component once, in order
REENTRANT = [  # text encoders in turn, the vae first and last, two models in the loop
    "sdxl",
    "sd3",
    "flux_true_cfg",
    "sd15_img2img",
    "sdxl_img2img",
    "flux_img2img",
    "sd15_controlnet",
    "sana_controlnet",
    "audioldm2",
]
OTHER = ["sd15_image_encoder", "audioldm", "kandinsky_prior", "stable_cascade", "qwen_image"]


class Call(NamedTuple):
    output: torch.Tensor
    peak_nbytes: int
    moved: sim.Counters

    @property
    def traffic_nbytes(self):
        return self.moved.h2d_nbytes + self.moved.d2h_nbytes


def calls(name, offload):
    pipe = build(name)
    offload(pipe)
    made = []
    for _ in range(CALLS):
        with Meter() as meter:
            output = run(pipe, name)
        made.append(Call(output, meter.peak_nbytes, meter.moved))
    return made


def with_accelerate(pipe):
    pipe.enable_model_cpu_offload(device="sim")


def without_offload(pipe):
    pipe.to("sim")


@pytest.mark.parametrize("name", LINEAR + REENTRANT + OTHER)
def test_it_takes_no_more_memory_than_accelerate_and_less_traffic(name):
    theirs, ours = calls(name, with_accelerate), calls(name, offload_engine.attach)
    own = calls(name, without_offload)
    for them, us, bare in zip(theirs, ours, own, strict=True):
        assert torch.equal(us.output, them.output) and torch.equal(us.output, bare.output)
        assert us.peak_nbytes <= them.peak_nbytes
        assert us.moved.d2h_nbytes == bare.moved.d2h_nbytes  # of weights: none
        assert us.traffic_nbytes < them.traffic_nbytes
        assert us.moved.host_syncs < them.moved.host_syncs
    assert ours[1].moved.h2d_nbytes <= ours[0].moved.h2d_nbytes


@pytest.mark.parametrize("name", LINEAR)
def test_where_each_component_runs_once_no_more_is_fetched_than_by_accelerate(name):
    theirs, ours = calls(name, with_accelerate), calls(name, offload_engine.attach)
    for them, us in zip(theirs, ours, strict=True):
        assert us.moved.h2d_nbytes <= them.moved.h2d_nbytes


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("sd15_image_encoder", "text_encoder"),  # it was never evicted: loaded, unused components
        ("sd15_img2img", "vae"),  # it stayed beside the unet
        ("sana_controlnet", "vae"),
        ("kandinsky_prior", "prior"),
    ],
)
def test_what_accelerate_forgets_on_the_device_is_what_is_saved(name, component):
    theirs, ours = calls(name, with_accelerate), calls(name, offload_engine.attach)
    weights = sum(p.nbytes for p in getattr(build(name), component).parameters())
    for them, us in zip(theirs, ours, strict=True):
        assert them.peak_nbytes - us.peak_nbytes > weights / 2
