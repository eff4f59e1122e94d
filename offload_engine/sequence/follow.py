"""Where a call is in the trace that was predicted for it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq


class Follower:
    """Follows a call through ``trace``, and finds its place again after any deviation.

    ``at`` is the index of the use that was entered last, -1 before the first; ``deviations``
    counts the entries that were not the next use.
    """

    def __init__(self, trace: Seq[str]) -> None:
        self.at = -1
        self.deviations = 0
        self._trace = trace
        self._places: dict[str, list[int]] = {}
        for index, name in enumerate(trace):
            self._places.setdefault(name, []).append(index)

    def enter(self, name: str) -> int | None:
        """The index of the use of ``name`` that begins; None, and no move, if it has none.

        It is the next use, or the one that runs, or else the use of ``name`` nearest to the next,
        rather ahead than behind.
        """
        ahead = self.at + 1
        if self.at >= 0 and self._trace[self.at] == name:
            return self.at
        if ahead < len(self._trace) and self._trace[ahead] == name:
            self.at = ahead
            return ahead
        self.deviations += 1
        places = self._places.get(name)
        if places is None:
            return None
        self.at = _nearest(places, ahead)
        return self.at


def _nearest(places: list[int], to: int) -> int:
    """The number in ``places``, which are sorted, nearest to ``to``; the larger of two."""
    after = bisect_left(places, to)
    around = places[max(after - 1, 0) : after + 1]
    return min(around, key=lambda place: (abs(place - to), -place))
