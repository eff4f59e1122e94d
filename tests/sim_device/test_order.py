"""The race model against its definition: on random programs it objects exactly where it should."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from offload_engine import sim


class Use(NamedTuple):
    stream: int
    block: int
    begin: int
    end: int
    writes: bool


class Record(NamedTuple):
    stream: int
    event: int


class Wait(NamedTuple):
    stream: int
    event: int


def random_program(rng: random.Random, length: int = 25) -> list[Use | Record | Wait]:
    def step():
        stream, kind = rng.randrange(3), rng.random()
        if kind < 0.3:
            return Record(stream, rng.randrange(3))
        if kind < 0.6:
            return Wait(stream, rng.randrange(3))
        begin = rng.randrange(4)
        return Use(stream, rng.randrange(2), begin, rng.randint(begin + 1, 4), rng.random() < 0.3)

    return [step() for _ in range(length)]


def first_race(program) -> int | None:
    """By definition: a use that conflicts with an earlier one that does not happen before it."""
    known: list[set[int]] = [set() for _ in range(3)]
    events: list[set[int]] = [set() for _ in range(3)]
    for now, step in enumerate(program):
        if isinstance(step, Record):
            events[step.event] = set(known[step.stream])
        elif isinstance(step, Wait):
            known[step.stream] |= events[step.event]
        else:
            for then, other in enumerate(program[:now]):
                if isinstance(other, Use) and then not in known[step.stream]:
                    touches = other.begin < step.end and step.begin < other.end
                    if other.block == step.block and touches and (other.writes or step.writes):
                        return now
            known[step.stream].add(now)
    return None


def first_objection(program) -> int | None:
    blocks = [torch.zeros(4, 16, device="sim") for _ in range(2)]
    torch.accelerator.synchronize()
    streams = [torch.Stream(device="sim") for _ in range(3)]
    events = [torch.Event(device="sim") for _ in range(3)]
    objection = None
    for now, step in enumerate(program):
        if isinstance(step, Record):
            streams[step.stream].record_event(events[step.event])
        elif isinstance(step, Wait):
            streams[step.stream].wait_event(events[step.event])
        else:
            rows = blocks[step.block][step.begin : step.end]
            try:
                with streams[step.stream]:
                    rows.fill_(1.0) if step.writes else rows.sum()
            except sim.Violation:
                objection = now
                break
    torch.accelerator.synchronize()
    return objection


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_are_objected_to_exactly_where_they_race(seed):
    rng = random.Random(seed)
    answers = []
    for _ in range(40):
        program = random_program(rng)
        expected = first_race(program)
        assert first_objection(program) == expected, program
        answers.append(expected)
    assert None in answers and any(answers)  # both kinds were tried
