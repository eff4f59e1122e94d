"""How good the planner is, and how fast: ``python -m benchmarks.planner [--quick] [--save FILE]``.

Small instances are held against the optimum, FLUX.1 against the plan's own bound. No GPU, one core.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offload_engine.plan import Plan, Use, build_plan

from .children import write_result
from .instances import GIB, MIB, Instance, anything, cut, denoiser, flux, least_nbytes, optimum
from .least import HAS_SCIPY, fewest_nbytes
from .provenance import provenance
from .shapes import SHAPES, SHARES
from .tables import table

_LINKS = {"RTX 4090": (23.9e9, 0.6), "H200": (52e9, 0.24)}  # bytes per second, seconds per step
_PARTS = 4  # of a block, as the engine cuts it
_SLOW = {f"{gb} GB/s, 0.6 s a step": (gb * 1e9, 0.6) for gb in (4, 8, 12)}


def timed_plan(instance: Instance, cyclic: bool = False) -> tuple[Plan, float]:
    """The plan, and the seconds of processor time that it took."""
    begun = time.process_time()
    plan = build_plan(**instance.arguments, cyclic=cyclic)
    return plan, time.process_time() - begun


def small(count: int) -> list[dict[str, Any]]:
    """Random small instances against their optimum."""
    families: dict[str, Callable[[int], Instance]] = {"denoiser": denoiser, "anything": anything}
    rows = []
    for name, family in families.items():
        above, proven, seconds = [], [], []
        for seed in range(count):
            instance = family(seed)
            plan, spent = timed_plan(instance)
            best = optimum(instance)
            seconds.append(spent)
            if best > 0:
                above.append(max(0.0, plan.seconds / best - 1))
                proven.append(plan.bound_seconds / best)
        rows.append(
            {
                "instances": name,
                "count": count,
                "above optimum, mean %": 100 * statistics.mean(above),
                "max %": 100 * max(above),
                "bound / optimum, mean": statistics.mean(proven),
                "min": min(proven),
                "plan ms, mean": 1e3 * statistics.mean(seconds),
                "max ms": 1e3 * max(seconds),
            }
        )
    return rows


def image(steps: int, links: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """FLUX.1 against the bound, once and as a steady cycle; the bytes of the latter against those
    that Belady's rule would fetch if every byte were a page of its own."""
    rows = []
    for machine, (bandwidth, step_seconds) in links.items():
        for gib in (12, 16, 20, 24):
            for parts, cyclic in ((1, False), (1, True), (_PARTS, True)):
                instance = flux(
                    budget=gib * GIB, bandwidth=bandwidth, step_seconds=step_seconds, steps=steps
                )
                instance = cut(instance, parts, lambda name: "." in name or name[-1] == "2")
                plan, spent = timed_plan(instance, cyclic)
                rows.append(
                    {
                        "FLUX.1 on": machine,
                        "GiB": gib,
                        "parts": parts,
                        "cyclic": "yes" if cyclic else "once",
                        "seconds": round(plan.seconds, 3),
                        "stall": round(plan.stall_seconds, 3),
                        "bound": round(plan.bound_seconds, 3),
                        "above %": round(100 * (plan.seconds / plan.bound_seconds - 1), 2),
                        "fetched GB": round(plan.fetched_nbytes / 1e9, 1),
                        "of the least": round(plan.fetched_nbytes / least_nbytes(plan), 3)
                        if cyclic
                        else None,
                        "plan s": round(spent, 2),
                    }
                )
    return rows


def models() -> list[dict[str, Any]]:
    """Pipelines of the proportions of real models under budgets, as steady cycles; bytes against
    what Belady's rule would fetch; the same for the fewest that any cycle has to that is as fast,
    and that is within 1.05 of the bound."""
    rows = []
    for name, shape in SHAPES.items():
        for share in SHARES:
            whole = shape.instance(share)
            instance = cut(whole, _PARTS, lambda name: ".row_" in name)
            plan, spent = timed_plan(instance, cyclic=True)
            least = least_nbytes(plan)
            limits = (plan.seconds * (1 + 1e-6), 1.05 * plan.bound_seconds)
            as_fast, within = (fewest_nbytes(whole, each) if HAS_SCIPY else 0 for each in limits)
            rows.append(
                {
                    "model": name,
                    "budget %": round(100 * share),
                    "seconds": round(plan.seconds, 3),
                    "above bound %": round(100 * (plan.seconds / plan.bound_seconds - 1), 2),
                    "fetched GB": round(plan.fetched_nbytes / 1e9, 1),
                    "of the least": round(plan.fetched_nbytes / least, 3),
                    "any as fast": round(as_fast / least, 3) if as_fast else None,
                    "any within 1.05": round(within / least, 3) if within else None,
                    "plan s": round(spent, 2),
                }
            )
    return rows


def growth(most: int) -> list[dict[str, Any]]:
    """Cost over the number of uses: FLUX.1 blocks, and 200 blocks of seven sizes."""
    rows = []
    for count in (10**3, 10**4, 10**5):
        if count > most:
            break
        sizes = {f"block.{i}": (100 + 10 * (i % 7)) * MIB for i in range(200)}
        uses = [Use((f"block.{i % 200}",), 0.002) for i in range(count)]
        loops = {
            "FLUX.1": flux(
                budget=12 * GIB, bandwidth=52e9, step_seconds=0.24, steps=round(count / 57)
            ),
            "200 blocks": Instance(sizes, uses, sum(sizes.values()) // 2, 50e9),
        }
        for name, instance in loops.items():
            plan, spent = timed_plan(instance)
            rows.append(
                {
                    "loop": name,
                    "uses": len(instance.uses),
                    "plan s": round(spent, 2),
                    "us per use": round(1e6 * spent / len(instance.uses)),
                    "above %": round(100 * (plan.seconds / plan.bound_seconds - 1), 2),
                }
            )
    return rows


def measure(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table; ``quick``: fewer instances, shorter loops."""
    return {
        "small": small(100 if quick else 1000),
        "flux": image(4 if quick else 28, _LINKS),
        "slow": image(4 if quick else 28, _SLOW),
        "models": models(),
        "growth": growth(10**4 if quick else 10**5),
    }


def show(results: dict[str, list[dict[str, Any]]]) -> str:
    """The tables."""
    tables = (
        table(list(rows[0]), [list(row.values()) for row in rows]) for rows in results.values()
    )
    return "\n\n".join(tables)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer instances, shorter loops")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all rows as JSON")
    args = parser.parse_args(arguments)
    results = measure(args.quick)
    print(show(results))
    if args.save:
        made = {**provenance(), "processor": platform.processor(), **results}
        write_result(args.save, made)


if __name__ == "__main__":
    main()
