"""For pytest: the fixture ``sim_device`` and the marker ``sim``.

Anyone can test an offloaded pipeline with it on a machine without a GPU. The device joins the
process for good and becomes its accelerator, so keep such tests in a process of their own.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    import torch

_MARKER = (
    "sim(capacity='8GiB', pinned_limit='1GiB', **settings): settings of the simulated device "
    "for one test; the others are those of offload_engine.sim.configure()."
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def sim_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """``sim:0``, fresh: counters, clock and settings start anew.

    The test fails if it leaves a violation that was never raised, as one in a destructor.
    Without a simulator it is skipped, or with OFFLOAD_ENGINE_REQUIRE_SIM=1 fails.
    """
    from offload_engine import sim

    try:
        device = sim.load()
    except sim.SimUnavailable as error:
        _give_up(str(error))
    gc.collect()
    sim.reset()
    for marker in reversed(list(request.node.iter_markers("sim"))):
        sim.configure(**_settings(marker))
    yield device
    gc.collect()
    unraised = [found for found in sim.violations() if found.state == "unraised"]
    sim.reset()
    if unraised:
        pytest.fail("\n".join(f"sim violation: {f.check}: {f.text}" for f in unraised), False)


def _give_up(reason: str) -> NoReturn:
    if os.environ.get("OFFLOAD_ENGINE_REQUIRE_SIM") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _settings(marker: pytest.Mark) -> dict[str, Any]:
    from offload_engine.units import parse_nbytes

    settings = dict(marker.kwargs)
    for short in ("capacity", "pinned_limit"):
        if short in settings:
            settings[f"{short}_nbytes"] = parse_nbytes(settings.pop(short), short)
    return settings
