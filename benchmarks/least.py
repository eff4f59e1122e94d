"""The fewest bytes that any cycle within given seconds can copy, by linear programming.

Every byte counts as a page of its own, so no plan can do better, however finely it cuts. After
Albers, Garg and Leonardi, "Minimizing stall time in single and parallel disk systems" (J. ACM 47,
2000). Needs scipy, which nothing else here does.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from .instances import Instance

HAS_SCIPY = importlib.util.find_spec("scipy") is not None


def fewest_nbytes(instance: Instance, seconds: float) -> float | None:
    """Bytes of a steady cycle of at most ``seconds``; None if there is none.

    Per use and segment three numbers: what is there when the use starts, what is copied in the
    stall before it, and what is copied while it runs. What is copied takes room at once.
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    names, uses = list(instance.nbytes), instance.uses
    count, length = len(names), len(uses)
    index = {name: number for number, name in enumerate(names)}
    unit = max(instance.nbytes.values())
    sizes = np.array([instance.nbytes[name] / unit for name in names])
    there, stalled, running = (
        np.arange(length * count).reshape(length, count) + part * length * count
        for part in range(3)
    )
    stall = 3 * length * count + np.arange(length)
    lower = np.zeros(3 * length * count + length)
    upper = np.full(len(lower), np.inf)
    rows: list[tuple[Any, Any, float]] = []  # columns, factors, at most

    def at_most(limit: float, *terms: tuple[Any, float]) -> None:
        columns = np.concatenate([np.atleast_1d(each) for each, _ in terms])
        factors = np.concatenate([np.full(np.size(each), factor) for each, factor in terms])
        rows.append((columns, factors, limit))

    for at, use in enumerate(uses):
        upper[there[at]] = sizes
        needed = [index[name] for name in use.segments]
        lower[there[at, needed]] = sizes[needed]
        upper[running[at, needed]] = 0
        for one in range(count):
            before = (there[at - 1, one], -1.0), (running[at - 1, one], -1.0)
            at_most(0, (there[at, one], 1), *before, (stalled[at, one], -1))
        room = (instance.budget - use.workspace_nbytes) / unit
        at_most(room, (there[at], 1), (running[at], 1))
        link = instance.bandwidth / unit
        at_most(0, (stalled[at], 1), (stall[at], -link))
        at_most(link * use.seconds, (running[at], 1))
    at_most(seconds - sum(use.seconds for use in uses), (stall, 1))

    lengths = [len(columns) for columns, _, _ in rows]
    matrix = coo_matrix(
        (
            np.concatenate([factors for _, factors, _ in rows]),
            (
                np.repeat(np.arange(len(rows)), lengths),
                np.concatenate([columns for columns, _, _ in rows]),
            ),
        ),
        shape=(len(rows), len(lower)),
    )
    cost = np.zeros(len(lower))
    cost[stalled.ravel()] = cost[running.ravel()] = 1
    limits = [limit for _, _, limit in rows]
    bounds = np.stack([lower, upper], axis=1)
    found = linprog(cost, matrix.tocsr(), limits, bounds=bounds, method="highs-ipm")
    return float(found.fun) * unit if found.status == 0 else None
