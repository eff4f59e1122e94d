"""Which unit runs when: as declared, as learned from a trace, as predicted. No torch."""

from .chain import Cursor, learn, stages_of
from .follow import Follower
from .language import Sequence, declared, missing, parse
from .pattern import Loop, Pattern

__all__ = [
    "Cursor",
    "Follower",
    "Loop",
    "Pattern",
    "Sequence",
    "declared",
    "learn",
    "missing",
    "parse",
    "stages_of",
]
