"""The pytest plugin, run in pytests of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """Runs a test file and returns pytest's output."""

    def run_file(text: str, **environment: str) -> str:
        path = tmp_path / "test_it.py"
        path.write_text(textwrap.dedent(text))
        command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(path)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path).stdout

    return run_file


def test_the_fixture_and_the_marker_configure_the_device(run):
    out = run(
        """
        import pytest, torch
        from offload_engine import sim

        @pytest.mark.sim(capacity="1GiB", pinned_limit="1MiB", h2d_bandwidth=1e9)
        def test_marked(sim_device):
            assert torch.sim.mem_get_info()[1] == 2**30
            with pytest.raises(RuntimeError):
                torch.empty(2**21, dtype=torch.uint8, pin_memory=True)
            torch.zeros(10**6, dtype=torch.uint8).pin_memory().to(sim_device)
            assert sim.now() == 1e-3

        def test_next_one_is_fresh(sim_device):
            assert torch.sim.mem_get_info()[1] == 64 * 2**30
            assert sim.now() == 0
        """
    )
    assert "2 passed" in out


def test_a_violation_that_was_never_raised_fails_the_test(run):
    out = run(
        """
        import torch

        def test_drops_a_copy_in_flight(sim_device):
            side = torch.Stream(device=sim_device)
            host = torch.zeros(8).pin_memory()
            there = torch.empty(8, device=sim_device)
            side.wait_event(torch.accelerator.current_stream().record_event())
            with side:
                there.copy_(host, non_blocking=True)
        """
    )
    assert "1 error" in out
    assert "sim violation: unordered-free" in out


def test_a_violation_that_was_raised_is_left_to_the_program(run):
    out = run(
        """
        import contextlib
        import torch

        def test_swallows(sim_device):
            side = torch.Stream(device=sim_device)
            there = torch.zeros(8, device=sim_device)
            with side, contextlib.suppress(Exception):
                there + 1
            side.synchronize()
        """
    )
    assert "1 passed" in out


def test_without_a_simulator_the_test_is_skipped_or_fails(run):
    text = "def test_it(sim_device): pass"
    out = run(text, CXX="no-such-compiler")
    assert "1 skipped" in out and "no C++ compiler" in out
    out = run(text, CXX="no-such-compiler", OFFLOAD_ENGINE_REQUIRE_SIM="1")
    assert "1 error" in out and "no C++ compiler" in out
