"""Tests of the simulated device itself. Run them in a process of their own.

The fixture ``sim_device`` comes with the package, as a pytest plugin.
"""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def device(sim_device):
    """Every test here runs on a fresh device."""
    return sim_device
