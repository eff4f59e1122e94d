"""What each use in a call cost: seconds on the device, and memory beside the weights.

[Note: workspace] The peak that torch keeps is the user's and only grows; it is never reset. If it
grew during a use, it tells the use's workspace to the byte. If not, what lay below it is a safe
upper bound, often a bad one: a decoder that runs after a large denoiser stays below its peak. So
where a plan depends on it, the first forward of a use is also watched operator by operator
(`Sampler`): no operator needs more than what is allocated before it and all that it allocates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import slots
from .transfers import Link, elapsed_seconds


class Mark:
    """One use of a unit, as it is measured."""

    __slots__ = (
        "began", "ended", "forwards", "held_nbytes", "peak_after_nbytes", "peak_before_nbytes",
        "reached", "sampled_nbytes", "sampled_work", "unit", "work",
    )  # fmt: skip

    def __init__(self, unit: str, work: int) -> None:
        self.unit = unit
        self.work = work  # elements in the arguments, at most: a measure of the activations
        self.forwards = 1  # of those that were seen; some guides let all but the first pass
        self.reached: torch.Event | None = None  # the use before has ended
        self.began: torch.Event | None = None  # its weights have landed
        self.ended: torch.Event | None = None
        self.held_nbytes = 0  # in slots, while it ran
        self.peak_before_nbytes = 0  # of all that is allocated
        self.peak_after_nbytes = 0
        self.sampled_nbytes: int | None = None  # most that its operators can have allocated
        self.sampled_work = -1  # of the largest forward that was sampled

    @property
    def seconds(self) -> float:
        return elapsed_seconds(self.began, self.ended)

    @property
    def stall_seconds(self) -> float:
        return 0.0 if self.began is self.reached else elapsed_seconds(self.reached, self.began)

    def workspace_nbytes(self, outside_nbytes: int) -> tuple[int, bool]:
        """Bytes beside the weights, and whether they are exact and not an upper bound.

        ``outside_nbytes``: what was allocated before the call, apart from weights.
        """
        below = self.held_nbytes + outside_nbytes
        workspace = max(0, self.peak_after_nbytes - below)
        if self.peak_after_nbytes > self.peak_before_nbytes:
            return workspace, True
        if self.sampled_nbytes is not None:
            workspace = min(workspace, max(0, self.sampled_nbytes - below))
        return workspace, False


class Meter:
    """Marks the uses of one call on a device."""

    def __init__(self, link: Link | None, most_marks: int = 200_000) -> None:
        self._link = link
        self.marks: deque[Mark] = deque(maxlen=most_marks)
        # Allocated apart from weights, when the call began; see also `end`.
        self.outside_nbytes = 0 if link is None else slots.outside_nbytes(link.device)
        self.workspaces: dict[str, tuple[int, int]] = {}  # unit -> largest work, its workspace

    @property
    def is_full(self) -> bool:
        """Whether the first marks may be gone."""
        return len(self.marks) == self.marks.maxlen

    def boundary(self) -> torch.Event | None:
        """The use that runs ends here."""
        if self._link is None:
            return None
        event = self._link.mark()
        if self.marks:
            last = self.marks[-1]
            last.ended = event
            last.peak_after_nbytes = slots.peak_nbytes(self._link.device)
            measured = (last.work, last.workspace_nbytes(self.outside_nbytes)[0])
            self.workspaces[last.unit] = max(self.workspaces.get(last.unit, measured), measured)
        return event

    def end(self, result_nbytes: int) -> None:
        """The call ends here. What it leaves on the device, beside a result that takes
        ``result_nbytes``, takes the place of what the next call would leave: it is no growth."""
        self.boundary()
        if self._link is not None:
            left = slots.outside_nbytes(self._link.device) - result_nbytes
            self.outside_nbytes = max(self.outside_nbytes, left)

    def begin(self, mark: Mark, reached: torch.Event | None, late: bool) -> None:
        """Its weights are there or on their way (``late``); the next operators belong to it."""
        self.marks.append(mark)
        if self._link is None:
            return
        mark.reached = reached
        mark.began = self._link.mark() if late else reached
        mark.held_nbytes = slots.lent_nbytes(self._link.device)
        mark.peak_before_nbytes = slots.peak_nbytes(self._link.device)


class Sampler(TorchDispatchMode):
    """Notes the most bytes that the operators inside it can have had allocated at any time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._read = _memory_reader(device)
        self.most_nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        current, total = self._read()
        result = func(*args, **(kwargs or {}))
        reached = current + self._read()[1] - total
        if reached > self.most_nbytes:
            self.most_nbytes = reached
        return result

    @staticmethod
    def works_on(device: torch.device) -> bool:
        """Whether the allocator counts what it ever allocated."""
        try:
            current, total = _memory_reader(device)()
        except (RuntimeError, AttributeError, KeyError, TypeError):
            return False
        return total >= current and (total > 0 or current == 0)


def _memory_reader(device: torch.device) -> Callable[[], tuple[int, int]]:
    """Gives bytes allocated now, and ever. The public calls sort all statistics: 100 us."""
    name = "_cuda_memoryStats" if device.type == "cuda" else "_accelerator_getDeviceStats"
    read = getattr(torch._C, name)
    index = device.index

    def memory() -> tuple[int, int]:
        counts = read(index)["allocated_bytes"]["all"]
        return counts["current"], counts["allocated"]

    return memory
