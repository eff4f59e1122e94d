"""Tests of the simulated device itself. Run them in a process of their own."""

from __future__ import annotations

import os

import pytest

# The fixture `sim_device` comes with the package, as a pytest plugin. Bit-for-bit parity needs the
# same number of threads on both sides of a comparison, and two cores are plenty.
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(autouse=True)
def device(sim_device):
    """Every test here runs on a fresh device."""
    return sim_device
