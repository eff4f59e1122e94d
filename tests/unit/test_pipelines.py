"""The pipelines of tests and benchmarks: deterministic, offline, and each component counts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.pipelines import PIPELINES, Case, UnknownSizeError, build_sdxl, modules

_JUDGES = {"safety_checker"}  # these run, and do not draw

each_case = pytest.mark.parametrize("case", PIPELINES.values(), ids=PIPELINES)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a pipeline tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small lose by a second thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(case: Case, pipe: Any) -> torch.Tensor:
    return torch.as_tensor(case.run(pipe, steps=2))


@torch.no_grad()
def disturb(module: nn.Module) -> list[torch.Tensor]:
    """Adds noise to every weight; returns what they were."""
    before = [weight.clone() for weight in module.parameters()]
    noise = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.add_(0.05 * torch.randn(weight.shape, generator=noise))
    return before


@torch.no_grad()
def restore(module: nn.Module, before: list[torch.Tensor]) -> None:
    for weight, value in zip(module.parameters(), before, strict=True):
        weight.copy_(value)


@each_case
def test_a_case_gives_the_same_bits_at_each_run_and_at_each_build(case: Case) -> None:
    pipe = case.build()
    first = run(case, pipe)

    assert first.isfinite().all()
    assert first.std() > 0.01
    assert torch.equal(run(case, pipe), first)
    assert torch.equal(run(case, case.build()), first)


@each_case
def test_each_component_shows_in_the_result_but_the_unused(case: Case) -> None:
    pipe = case.build()
    expected = run(case, pipe)
    for name, module in modules(pipe).items():
        before = disturb(module)
        changed = not torch.equal(run(case, pipe), expected)
        restore(module, before)
        assert changed == (name not in {*case.unused, *_JUDGES}), name


@each_case
def test_a_case_is_ready_for_inference(case: Case) -> None:
    for name, module in modules(case.build()).items():
        assert not module.training, name
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}, name


def test_another_seed_gives_other_weights() -> None:
    case = PIPELINES["sd15"]

    assert not torch.equal(run(case, case.build(seed=1)), run(case, case.build()))


def test_building_leaves_the_callers_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_sdxl()

    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_spares_what_the_class_keeps_in_fp32() -> None:
    transformer = PIPELINES["wan_t2v"].build(dtype=torch.float16).transformer

    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.proj_out.weight.dtype == torch.float16


def test_the_demo_size_is_small_enough_for_a_laptop_and_mostly_unet() -> None:
    pipe = build_sdxl("demo")
    nbytes = {name: sum(w.nbytes for w in m.parameters()) for name, m in modules(pipe).items()}

    assert 150e6 < sum(nbytes.values()) < 300e6
    assert nbytes["unet"] > sum(nbytes.values()) / 2


def test_an_unknown_size_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownSizeError, match="choose one of: tiny, demo, full") as error:
        build_sdxl("huge")
    assert error.value.size == "huge"
