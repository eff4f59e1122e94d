"""What all tests have in common."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """What is loaded by now lives to the end: collecting garbage need not walk it every time."""
    gc.collect()
    gc.freeze()
