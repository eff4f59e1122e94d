import logging

import pytest
import torch

from offload_engine import host_store
from offload_engine.errors import OffloadError
from offload_engine.host_store import Block, HostStore, machine_nbytes, register
from offload_engine.segments import layout


class Driver:
    """Keeps the book that a driver would keep; fails from the n-th registration on."""

    def __init__(self, fail_at=10**9):
        self.pieces, self.calls, self.fail_at = {}, 0, fail_at

    def do_register(self, address, nbytes):
        self.calls += 1
        if self.calls > self.fail_at:
            return 2
        self.pieces[address] = nbytes
        return 0

    def do_unregister(self, address):
        del self.pieces[address]
        return 0

    @property
    def registrar(self):
        return self.do_register, self.do_unregister


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(host_store, "_PIECE_NBYTES", 4096)


def test_memory_is_registered_in_pieces_that_copies_do_not_cross(small_pieces):
    flat, driver = host_store._anonymous(10_000), Driver()
    undo = register(flat, driver.registrar)
    start = flat.data_ptr()
    assert driver.pieces == {start: 4096, start + 4096: 4096, start + 8192: 10_000 - 8192}
    pieces = Block(flat).pieces()
    assert [(start + a, b - a) for a, b in pieces] == list(driver.pieces.items())
    undo()
    assert driver.pieces == {}


def test_a_registration_that_fails_halfway_is_taken_back(small_pieces):
    driver = Driver(fail_at=2)
    with pytest.raises(RuntimeError, match="error 2"):
        register(host_store._anonymous(20_000), driver.registrar)
    assert driver.pieces == {}


def test_a_carved_weight_saves_only_itself(tmp_path):
    tensors = [torch.randn(100, 100), torch.randn(10)]
    nbytes, views = layout(tensors)
    block = Block(host_store._anonymous(nbytes))
    small = block.carve(views[1])
    assert small.untyped_storage().nbytes() == 40
    torch.save(small, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 4000


def test_aliases_carved_from_a_block_share_their_storage():
    whole = torch.randn(8, 8)
    nbytes, views = layout([whole, whole[2:4]])
    block = Block(host_store._anonymous(nbytes))
    left, right = block.carve(views[0]), block.carve(views[1])
    left.fill_(3.0)
    assert (right == 3.0).all()


def test_what_was_carved_outlives_its_block():
    nbytes, views = layout([torch.randn(1000)])
    block = Block(host_store._anonymous(nbytes))
    weight = block.carve(views[0])
    weight.fill_(5.0)
    assert block.close()
    del block
    assert (weight == 5.0).all()


def test_over_its_limit_the_store_goes_on_pageable_and_says_so_once(caplog):
    store = HostStore(torch.device("cuda", 0), pin=1000)  # no device is touched over the limit
    with caplog.at_level(logging.WARNING, "offload_engine"):
        for _ in range(3):
            block = store.allocate(2000)
            store.seal(block)
            assert not block.pinned
    assert len(caplog.records) == 1
    assert "2.0 KiB" in caplog.text and "1000 B" in caplog.text


def test_pin_false_is_silent(caplog):
    store = HostStore(torch.device("cuda", 0), pin=False)
    store.seal(store.allocate(100))
    assert not caplog.records


@pytest.mark.parametrize("bad", ["lots", -1, 0, "8 GiBB", None])
def test_a_bad_pin_is_refused(bad):
    with pytest.raises(OffloadError, match="pin="):
        HostStore(torch.device("cpu"), pin=bad)


def test_the_automatic_limit_leaves_the_machine_some_memory():
    limit = HostStore(torch.device("cpu")).limit_nbytes
    assert 0.4 * machine_nbytes() <= limit + 1 and limit <= 0.9 * machine_nbytes()
