"""What to fetch and what to drop, decided ahead: pure, without torch.

``build_plan`` turns sizes, the order of uses, a budget and a bandwidth into a `Plan`: its steps,
its predicted time, and a proof of how far from the best possible that is.
"""

from ..errors import PlanError
from .build import build_plan
from .model import Plan, Span, Step, Use

__all__ = ["Plan", "PlanError", "Span", "Step", "Use", "build_plan"]
