"""Questions for the planner, and their best answers: small random ones, FLUX.1 at its real sizes.

`optimum` finds the least seconds of all legal plans; it shares no code with the planner.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from math import inf
from typing import NamedTuple

from offload_engine.plan import Plan, Use

GIB, MIB = 2**30, 2**20


class Instance(NamedTuple):
    """A planning question."""

    nbytes: dict
    uses: list
    budget: float
    bandwidth: float
    resident: tuple = ()

    @property
    def arguments(self) -> dict:
        return {
            "nbytes": self.nbytes,
            "uses": self.uses,
            "budget_nbytes": self.budget,
            "bandwidth": self.bandwidth,
            "resident": self.resident,
        }


def optimum(instance: Instance) -> float:
    """The least seconds of all legal plans, by labels from boundary to boundary.

    A label is what is held, what is in flight, when, and when the link is free. It is enough to
    look at plans that (1) queue a copy at the last boundary before it starts, since queued there
    it lands as soon and takes memory later; (2) fetch what the next use lacks before all else,
    since to swap it forward makes the use no later and the others no later than it; (3) release
    no more than must go, since what is still there can go later.
    """
    nbytes, uses, budget, bandwidth, resident = instance
    names = list(nbytes)
    index = {name: number for number, name in enumerate(names)}
    copy = [nbytes[name] / bandwidth for name in names]
    needs = [sum(1 << index[name] for name in set(use.segments)) for use in uses]
    future = [0] * (len(uses) + 1)
    for position in range(len(uses) - 1, -1, -1):
        future[position] = future[position + 1] | needs[position]

    def members(bits: int) -> list[int]:
        return [number for number in range(len(names)) if bits >> number & 1]

    @cache
    def total(bits: int) -> float:
        return sum(nbytes[names[number]] for number in members(bits))

    @cache
    def fullest(bits: int, room: float) -> tuple:
        """All sets out of ``bits`` that fit and that no other of ``bits`` can be added to."""
        if total(bits) <= room:
            return (bits,)
        found, some = [], bits
        while True:
            rest = members(bits & ~some)
            if total(some) <= room and all(total(some | 1 << r) > room for r in rest):
                found.append(some)
            if not some:
                return tuple(found)
            some = (some - 1) & bits

    def fetches(away: list[int], free: float, end: float, held: int, room: float):
        """(bits, link free, segment that is then in flight or -1) of all that may be fetched."""

        def choose(first: int, bits: int, free: float):
            yield bits, free, -1
            for number in away:
                fits = not bits >> number & 1 and total(held | bits | 1 << number) <= room
                if fits and free < end < free + copy[number]:
                    yield bits | 1 << number, free + copy[number], number
            for place in range(first, len(away)):
                number = away[place]
                fits = total(held | bits | 1 << number) <= room
                if fits and free + copy[number] <= end:
                    yield from choose(place + 1, bits | 1 << number, free + copy[number])

        return choose(0, 0, free) if free < end else [(0, free, -1)]

    labels = {(sum(1 << index[name] for name in set(resident)), -1): [(0.0, 0.0)]}
    for position, use in enumerate(uses):
        room = (budget - use.workspace_nbytes) * (1 + 1e-12) + 1e-12
        after = future[position + 1]
        reached: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for (held, flying), times in labels.items():
            missing = needs[position] & ~held
            in_flight = 1 << flying if flying >= 0 else 0
            must = needs[position] | in_flight
            if total(must) > room:
                continue
            for now, link_free in times:
                free = link_free + sum(copy[number] for number in members(missing))
                end = (free if missing or in_flight & must & needs[position] else now) + use.seconds
                away = members(after & ~held & ~missing)
                for bits, free_then, late in fetches(away, free, end, must, room):
                    if late < 0 and free_then > end:
                        late = flying
                    if late >= 0 and not after >> late & 1:
                        late = -1
                    there = must | bits
                    for kept in fullest(held & ~there & after, room - total(there)):
                        key = (there | kept) & after, late
                        reached.setdefault(key, []).append((end, max(end, free_then)))
        labels = _best_of(reached)
    return min(now for times in labels.values() for now, _ in times)


def _best_of(reached: dict) -> dict:
    """Labels less those that hold no more, no sooner, than another."""
    kept: dict = {}
    for held, late in sorted(reached, key=lambda key: -key[0].bit_count()):
        times, earliest = [], inf
        for now, link_free in sorted(set(reached[held, late])):
            if link_free < earliest:
                times.append((now, link_free))
                earliest = link_free
        for (more, other), better in kept.items():
            if more & held == held and other in (-1, late):
                times = [
                    (now, free)
                    for now, free in times
                    if not any(n <= now and (other < 0 or f <= free) for n, f in better)
                ]
        if times:
            kept[held, late] = times
    return kept


def denoiser(seed: int) -> Instance:
    """One or two encoders, a loop over blocks with workspaces, mostly a decoder."""
    rng = random.Random(seed)
    real = rng.random() < 0.5
    number = rng.uniform if real else rng.randint
    nbytes: dict = {}
    uses: list = []
    for name in ("encoder", "encoder_2")[: rng.randint(1, 2)]:
        nbytes[name] = number(4, 20)
        uses.append(Use((name,), number(1, 6), number(0, 4)))
    blocks = [f"block.{i}" for i in range(rng.randint(2, 5))]
    alike, size = rng.random() < 0.4, number(3, 9)
    nbytes |= {name: size if alike else number(2, 10) for name in blocks}
    always = ("rest",) if rng.random() < 0.25 else ()
    nbytes |= {name: number(1, 3) for name in always}
    body = [Use((name, *always), number(1, 8), number(0, 5)) for name in blocks]
    uses += body * min(rng.randint(2, 4), 14 // len(blocks))
    if rng.random() < 0.8:
        nbytes["decoder"] = number(2, 8)
        uses.append(Use(("decoder",), number(1, 6), number(0, 10)))
    resident = tuple(name for name in nbytes if rng.random() < rng.choice([0, 0, 0, 0.5]))
    share = rng.choice([0, 0.1, 0.25, 0.4, 0.6, 0.8, rng.random()])
    budget = _budget(nbytes, uses, share, whole=not real)
    return Instance(nbytes, uses, budget, rng.choice([0.5, 1, 2, rng.uniform(0.3, 3)]), resident)


def anything(seed: int, segments: int = 6, length: int = 10) -> Instance:
    """Uses of any segments in any order, several at once or none, some of no time."""
    rng = random.Random(seed)
    real = rng.random() < 0.4
    number = rng.uniform if real else rng.randint
    nbytes = {f"s{i}": number(1, 12) for i in range(rng.randint(1, segments))}
    if rng.random() < 0.3:
        nbytes = dict.fromkeys(nbytes, 5)
    uses = []
    for _ in range(rng.randint(1, length)):
        count = min(len(nbytes), rng.choice([0, 1, 1, 1, 1, 2, 3]))
        seconds, workspace = rng.choice([0, number(0, 9)]), rng.choice([0, number(0, 6)])
        uses.append(Use(tuple(rng.sample(list(nbytes), count)), seconds, workspace))
    resident = tuple(name for name in nbytes if rng.random() < rng.choice([0, 0, 0.3, 1]))
    share = rng.choice([0, 0.05, 0.2, 0.4, 0.7, 1, rng.random()])
    budget = _budget(nbytes, uses, share, whole=not real)
    return Instance(nbytes, uses, budget, rng.choice([0.3, 0.5, 1, 2, 5]), resident)


def _budget(nbytes: dict, uses: list, share: float, *, whole: bool) -> float:
    """Between what the neediest use takes and what everything does."""
    least = max(sum(nbytes[name] for name in use.segments) + use.workspace_nbytes for use in uses)
    most = max(least, sum(nbytes.values()) + max(use.workspace_nbytes for use in uses))
    budget = max(1, least + (most - least) * share)
    return int(budget) if whole else budget


def flux(
    *, budget: int, bandwidth: float, step_seconds: float, steps: int = 28, workspace: int = GIB
) -> Instance:
    """FLUX.1: CLIP, T5, ``steps`` of 19 and 38 blocks, a decoder with a big workspace."""
    nbytes = {"text_encoder": 246 * MIB, "text_encoder_2": 9_524_000_000, "vae": 168 * MIB}
    nbytes |= {f"transformer.transformer_blocks.{i}": 648 * MIB for i in range(19)}
    nbytes |= {f"transformer.single_transformer_blocks.{i}": 270 * MIB for i in range(38)}
    blocks = [name for name in nbytes if name.startswith("transformer.")]
    uses = [Use(("text_encoder",), 0.01, 100 * MIB), Use(("text_encoder_2",), 0.05, 200 * MIB)]
    uses += [Use((name,), step_seconds / len(blocks), workspace) for name in blocks] * steps
    uses.append(Use(("vae",), step_seconds / 2, int(4.7 * GIB)))
    return Instance(nbytes, uses, budget, bandwidth)


def cut(
    instance: Instance, parts: int, names: Callable[[str], bool] = lambda name: True
) -> Instance:
    """``instance`` with each of ``names`` cut into ``parts`` that are used together."""
    pieces = {
        name: [f"{name}/{part}" for part in range(parts)] if names(name) else [name]
        for name in instance.nbytes
    }
    nbytes = {}
    for name, own in pieces.items():
        total = instance.nbytes[name]
        ends = [total * number / len(own) for number in range(len(own) + 1)]
        if isinstance(total, int):
            ends = [int(end) for end in ends]
        nbytes |= {each: b - a for each, (a, b) in zip(own, pairwise(ends), strict=True)}
    uses = [
        use._replace(segments=tuple(piece for name in use.segments for piece in pieces[name]))
        for use in instance.uses
    ]
    resident = tuple(piece for name in instance.resident for piece in pieces[name])
    return instance._replace(nbytes=nbytes, uses=uses, resident=resident)


def least_nbytes(plan: Plan) -> float:
    """Bytes a cycle if each byte were a page of its own and the best were kept (Belady)."""
    count, here, occurs = len(plan.uses), {}, {}
    for at, use in enumerate(plan.uses):
        for name in use.segments:
            occurs.setdefault(name, []).append(at)

    def next_use(name, now):
        cycle, at = divmod(now, count)
        found = occurs[name]
        index = bisect.bisect_right(found, at)
        return cycle * count + (found[index] if index < len(found) else count + found[0])

    for cycle in range(4):
        fetched = 0.0
        for at, use in enumerate(plan.uses):
            for name in use.segments:
                fetched += plan.nbytes[name] - here.get(name, 0)
                here[name] = plan.nbytes[name]
            over = sum(here.values()) - (plan.budget_nbytes - use.workspace_nbytes)
            others = [n for n, nbytes in here.items() if nbytes and n not in use.segments]
            others.sort(key=lambda name: -next_use(name, cycle * count + at))
            for name in others if over > 0 else ():
                gone = min(over, here[name])
                here[name] -= gone
                over -= gone
                if over <= 0:
                    break
    return fetched
