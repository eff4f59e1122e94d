"""The pattern behind the trace of a call, and what it predicts for the next call.

A trace names units in the order they were entered, 100,000 of them where a transformer runs block
by block. Its pattern is the text a person would write for it:
``text_encoder->28*(controlnet->unet)->vae``.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeAlias

Item: TypeAlias = "str | Loop"


@dataclass(frozen=True)
class Loop:
    """``body``, ``count`` times over. In a pattern that was found, ``count`` is 2 or more and
    ``body`` is not just another loop."""

    body: tuple[Item, ...]
    count: int

    def __str__(self) -> str:
        text = _text(self.body)
        return f"{self.count}*{text}" if text == self.body[0] else f"{self.count}*({text})"


@dataclass(frozen=True)
class Pattern:
    """A trace, written with loops. A leaf is one name in that text; all its uses are alike."""

    items: tuple[Item, ...]

    @classmethod
    def of(cls, trace: Seq[str]) -> Pattern:
        """The pattern that expands to ``trace``, see [Note: folding]. It takes a time near-linear
        in the length: 0.1 s for 100,000 uses of 57 blocks, seconds where nothing repeats."""
        return cls(_Folding().fold_names(trace))

    def __str__(self) -> str:
        return _text(self.items)

    def __len__(self) -> int:
        """Uses in the trace."""
        return sum(map(_uses, self.items))

    @property
    def trace(self) -> list[str]:
        """Every use, by name."""
        names = self.names
        return [names[leaf] for leaf in self.leaves]

    @property
    def leaves(self) -> list[int]:
        """Every use, by the number of its leaf in the text."""
        return _expand(self.items, 0)[0]

    @property
    def names(self) -> list[str]:
        """The name of each leaf, in order of the text."""
        return list(_names(self.items))

    def with_steps(self, before: int, now: int) -> Pattern:
        """The prediction for a call of ``now`` denoising steps, where this one had ``before``.

        The leaves stay the same. The first rule that finds a loop decides, see
        [Note: loops that count steps]. A call of one step shows no loop: nothing is scaled.
        """
        assert before >= 1 and now >= 1, (before, now)
        if before == now or before == 1:
            return self
        for rule in (_multiples, _same_unit, _neighbours, _largest(self.items)):
            items = _rescale(self.items, rule, before, now)
            if items is not None:
                return Pattern(items)
        return self


def _text(items: Seq[Item]) -> str:
    return "->".join(map(str, items))


def _uses(item: Item) -> int:
    return 1 if isinstance(item, str) else item.count * sum(map(_uses, item.body))


def _names(items: Seq[Item]) -> Iterator[str]:
    for item in items:
        if isinstance(item, str):
            yield item
        else:
            yield from _names(item.body)


def _expand(items: Seq[Item], first: int) -> tuple[list[int], int]:
    """The leaf of every use, the leaves numbered from ``first`` on; and the next free number."""
    leaves: list[int] = []
    for item in items:
        if isinstance(item, str):
            leaves.append(first)
            first += 1
        else:
            body, first = _expand(item.body, first)
            leaves += body * item.count
    return leaves, first


# ---- finding the loops
#
# [Note: folding] Every unit becomes a character, so that stretches of a trace are compared at the
# speed of memcmp. A repetition is a stretch of at least two equal rounds, taken as far as it goes.
# All repetitions are found; the one that saves the most text is folded into a single character,
# then the best of what is still free. An outer loop saves more than the loops inside it, so it
# goes first. Bodies are folded in the same way, and so is the result, where loops may repeat.
#
# Repetitions in the sense of Crochemore, "An optimal algorithm for computing the repetitions in a
# word" (1981); the search is simpler. It goes back from each unit to where it was seen last, and
# from each pair of units in a row to the last two such places. That finds a repetition unless
# every pair in its round comes three times or more. Such a round mostly has loops inside, and
# its repetition is found once those are folded.


class _Repetition(NamedTuple):
    """``text[start:stop]`` repeats itself after ``period`` uses. The first in order saves most."""

    change: int  # of the length of the text, if it is folded: negative
    period: int
    start: int
    stop: int

    @classmethod
    def at(cls, start: int, stop: int, period: int) -> _Repetition:
        return cls(-((stop - start) // period - 1) * period, period, start, stop)


class _Folding:
    """Folds one trace. Each unit or loop has a character of its own."""

    def __init__(self) -> None:
        self._numbers: dict[Item, int] = {}
        self._items: list[Item] = []
        self._sizes: list[int] = []  # leaves and loops in the text of each item
        self._firsts: list[int] = []  # the first unit of each item
        self._folded: dict[str, str] = {}

    def fold_names(self, trace: Seq[str]) -> tuple[Item, ...]:
        symbols = {name: self._symbol(name) for name in dict.fromkeys(trace)}
        return self._unpack(self._fold("".join([symbols[name] for name in trace])))

    def _fold(self, text: str) -> str:
        """The shorter of two readings: of a repetition of two and a half rounds, the half round
        is at the end or at the start. Of equals, the one whose rounds begin as the trace does."""
        if text not in self._folded:
            repetitions = _repetitions(text)
            readings = [self._read(text, repetitions, late) for late in (False, True)]
            self._folded[text] = min(readings, key=self._rank)
        return self._folded[text]

    def _read(self, text: str, repetitions: list[_Repetition], late: bool) -> str:
        """Folds until nothing repeats; ``late``: a loop is at the end of its repetition."""
        while repetitions:
            text = self._replace(text, _choose(repetitions, len(text), late))
            repetitions = _repetitions(text)
        return text

    def _replace(self, text: str, chosen: list[_Repetition]) -> str:
        parts, done = [], 0
        for _, period, start, stop in sorted(chosen, key=lambda repetition: repetition.start):
            body = self._fold(text[start : start + period])
            parts += [text[done:start], self._loop(body, (stop - start) // period)]
            done = stop
        return "".join([*parts, text[done:]])

    def _loop(self, body: str, count: int) -> str:
        items = self._unpack(body)
        if len(items) == 1 and isinstance(items[0], Loop):
            return self._symbol(Loop(items[0].body, items[0].count * count))
        return self._symbol(Loop(items, count))

    def _symbol(self, item: Item) -> str:
        number = self._numbers.setdefault(item, len(self._items))
        if number == len(self._items):
            self._items.append(item)
            body = [] if isinstance(item, str) else [self._numbers[inner] for inner in item.body]
            self._sizes.append(1 + sum(self._sizes[inner] for inner in body))
            self._firsts.append(self._firsts[body[0]] if body else number)
        return chr(number)

    def _unpack(self, text: str) -> tuple[Item, ...]:
        return tuple(self._items[ord(symbol)] for symbol in text)

    def _rank(self, text: str) -> tuple[int, list[int]]:
        """Its size, and the first unit of each of its loops, by when that was seen first."""
        numbers = [ord(symbol) for symbol in text]
        begins = [self._firsts[number] for number in numbers if self._sizes[number] > 1]
        return sum(self._sizes[number] for number in numbers), begins


def _repetitions(text: str) -> list[_Repetition]:
    """The repetitions in ``text``, see [Note: folding]."""
    found: list[_Repetition] = []
    reversed_text = text[::-1]
    searched: dict[int, int] = {}  # period -> up to where it was looked for
    for at, before in _seen_before(text):
        period = at - before
        if at >= searched.get(period, 0):
            stop = at + _common(text, before, at)
            start = before - _common(reversed_text, len(text) - at, len(text) - before)
            searched[period] = stop
            if stop - start >= 2 * period:
                found.append(_Repetition.at(start, stop, period))
    return found


def _seen_before(text: str) -> Iterator[tuple[int, int]]:
    """Each place with those before it where the same stood: the last for a unit, the last two
    for a pair of units in a row."""
    units: dict[str, int] = {}
    pairs: dict[str, tuple[int, int]] = {}
    for at, unit in enumerate(text):
        if unit in units:
            yield at, units[unit]
        units[unit] = at
        pair = text[at - 1 : at + 1]
        last, last_but_one = pairs.get(pair, (-1, -1))
        if last >= 0:
            yield at, last
        if last_but_one >= 0:
            yield at, last_but_one
        pairs[pair] = at, last


def _common(text: str, first: int, second: int) -> int:
    """How far the text from ``first`` on is like that from ``second``, which lies behind it.

    Gallops. No stretch matches beyond the end: the one from ``second`` on is cut shorter there.
    """
    begin, size = second, 1
    while text[first : first + size] == text[second : second + size]:
        first, second, size = first + size, second + size, size * 2
    while size := size // 2:
        if text[first : first + size] == text[second : second + size]:
            first, second = first + size, second + size
    return second - begin


def _choose(repetitions: list[_Repetition], length: int, late: bool) -> list[_Repetition]:
    """Whole rounds to fold, none overlapping, those that save most first. What of a repetition is
    taken already is cut off, and the rest considered again."""
    taken = bytearray(length)
    chosen: list[_Repetition] = []
    heap = list(repetitions)
    heapq.heapify(heap)
    while heap:
        _, period, start, stop = heapq.heappop(heap)
        free = list(_free(taken, start, stop))
        if free != [(start, stop)]:
            for a, b in free:
                if b - a >= 2 * period:
                    heapq.heappush(heap, _Repetition.at(a, b, period))
            continue
        rest = (stop - start) % period
        start, stop = (start + rest, stop) if late else (start, stop - rest)
        taken[start:stop] = b"\1" * (stop - start)
        chosen.append(_Repetition.at(start, stop, period))
    return chosen


def _free(taken: bytearray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The stretches between ``start`` and ``stop`` that are not taken."""
    while (begin := taken.find(0, start, stop)) >= 0:
        end = taken.find(1, begin, stop)
        start = end if end >= 0 else stop
        yield begin, start


# ---- another number of steps
#
# [Note: loops that count steps] Which loops go with the number of steps, a trace does not say.
# These rules are tried in turn, and each looks at outer loops before the loops inside them:
# 1. Loops with a count that is a multiple of the steps (two passes a step count as two).
# 2. Loops over the same unit that together run it a multiple of the steps, single uses beside
#    them included: 14*(controlnet->unet)->14*unet, or 27*(unet->extra)->unet. The single uses
#    stay, the loops share the rest.
# 3. Neighbouring loops with counts that add up to a multiple: 12*high_noise->28*low_noise.
# 4. The largest loop: with the steps if it is one round off (a scheduler that looks ahead runs
#    51 rounds for 50 steps), else in proportion (img2img runs a part of the steps).

_Rule: TypeAlias = Callable[[Seq[Item], int, int], dict[int, int]]


def _rescale(items: Seq[Item], rule: _Rule, before: int, now: int) -> tuple[Item, ...] | None:
    """``items`` with the counts that ``rule`` gives by index; None if it finds no loop at all.

    The rule is applied to the bodies of those loops that it leaves alone.
    """
    counts = rule(items, before, now)
    found = bool(counts)
    scaled: list[Item] = []
    for index, item in enumerate(items):
        if isinstance(item, str):
            scaled.append(item)
            continue
        body = None if index in counts else _rescale(item.body, rule, before, now)
        found = found or body is not None
        scaled += _rounds(item.body if body is None else body, counts.get(index, item.count))
    return tuple(scaled) if found else None


def _rounds(body: tuple[Item, ...], count: int) -> tuple[Item, ...]:
    """A loop, or its body where there is only one round, as in a pattern that was found."""
    return (Loop(body, count),) if count > 1 else body


def _loops(items: Seq[Item]) -> dict[int, Loop]:
    return {index: item for index, item in enumerate(items) if isinstance(item, Loop)}


def _multiples(items: Seq[Item], before: int, now: int) -> dict[int, int]:
    return {
        index: loop.count // before * now
        for index, loop in _loops(items).items()
        if loop.count % before == 0
    }


def _same_unit(items: Seq[Item], before: int, now: int) -> dict[int, int]:
    """Tries the units in order of their uses; a loop is scaled for the first of its units."""
    loops = _loops(items)
    single = Counter(item for item in items if isinstance(item, str))
    looped: Counter[str] = Counter()
    holders: dict[str, list[int]] = {}
    for index, loop in loops.items():
        for name, uses in _uses_by_name(loop).items():
            looped[name] += uses
            holders.setdefault(name, []).append(index)
    counts: dict[int, int] = {}
    for name, uses in looped.most_common():
        per_step, rest = divmod(uses + single[name], before)
        if rest == 0 and counts.keys().isdisjoint(holders[name]):
            shared = [loops[index].count for index in holders[name]]
            shares = _share(shared, max(per_step * now - single[name], 0), uses)
            counts.update(zip(holders[name], shares, strict=True))
    return counts


def _uses_by_name(item: Item) -> Counter[str]:
    if isinstance(item, str):
        return Counter((item,))
    body: Counter[str] = Counter()
    for inner in item.body:
        body.update(_uses_by_name(inner))
    return Counter({name: uses * item.count for name, uses in body.items()})


def _neighbours(items: Seq[Item], before: int, now: int) -> dict[int, int]:
    """In each row of loops, the longest part with counts that add up."""
    counts: dict[int, int] = {}
    for first, row in _rows(items):
        start, stop = _adds_up(row, before)
        if stop - start > 1:
            counts.update(enumerate(_share(row[start:stop], now, before), first + start))
    return counts


def _rows(items: Seq[Item]) -> Iterator[tuple[int, list[int]]]:
    """Each row of loops without a single use between them: its first index and its counts."""
    row: list[int] = []
    for index, item in enumerate([*items, ""]):
        if isinstance(item, Loop):
            row.append(item.count)
        elif row:
            yield index - len(row), row
            row = []


def _adds_up(counts: Seq[int], to: int) -> tuple[int, int]:
    """The longest part of ``counts`` with a sum that is a multiple of ``to``."""
    seen = {0: 0}  # the sum up to a place, modulo -> the first such place
    best = 0, 0
    for stop, total in enumerate(accumulate(counts), 1):
        start = seen.setdefault(total % to, stop)
        best = max(best, (start, stop), key=lambda part: part[1] - part[0])
    return best


def _largest(items: Seq[Item]) -> _Rule:
    """The rule for the outermost loop of the largest count, wherever it stands."""
    largest = max(_outermost(items), key=lambda loop: (loop.count, _uses(loop)), default=None)

    def rule(items: Seq[Item], before: int, now: int) -> dict[int, int]:
        alike = {index: loop for index, loop in _loops(items).items() if loop == largest}
        return {index: _near(loop.count, before, now) for index, loop in alike.items()}

    return rule


def _outermost(items: Seq[Item]) -> Iterator[Loop]:
    """Loops of more than two rounds that are in no other such loop."""
    for item in items:
        if isinstance(item, Loop) and item.count > 2:
            yield item
        elif isinstance(item, Loop):
            yield from _outermost(item.body)


def _near(count: int, before: int, now: int) -> int:
    for off in (-1, 1):
        if before > 3 and count > before - 2 and (count - off) % before == 0:
            return max(1, (count - off) // before * now + off)
    return _share([count], now, before)[0]


def _share(counts: Seq[int], now: int, before: int) -> list[int]:
    """``counts`` times ``now / before``, at least 1 each, rounded so that their sum is right."""
    shares: list[int] = []
    shared = 0
    for total in accumulate(counts):
        shares.append(max(1, (2 * total * now + before) // (2 * before) - shared))
        shared += shares[-1]
    return shares
