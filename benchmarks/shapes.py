"""The proportions of real models: how many blocks, how large, how long each takes.

GB and seconds are those of an RTX 4090, as far as they are known.
"""

from __future__ import annotations

from typing import NamedTuple

from offload_engine.plan import Use

from .instances import Instance

SHARES = (0.25, 0.35, 0.5, 0.7, 0.9)  # of the weights, as budgets
LINK = 23.9  # GB a second: an RTX 4090 with PCIe 4
_REST_SECONDS = 1e-6


class Row(NamedTuple):
    """Blocks that are alike: how many, their GB, and their seconds."""

    count: int
    gb: float
    seconds: float


class Shape(NamedTuple):
    """A pipeline: the rows of blocks of each component, and what is outside of them."""

    te: tuple[Row, ...]
    transformer: tuple[Row, ...]
    vae: tuple[Row, ...]
    passes: int = 1
    steps: int = 4
    rest_gb: float = 0.1
    scratch_gb: float = 0.3

    def instance(self, share: float, steps: int | None = None) -> Instance:
        """Its call with a budget of ``share`` of its weights, block by block."""
        nbytes: dict[str, int] = {}
        once: dict[str, list[Use]] = {}
        workspace = round(self.scratch_gb * 1e9)
        for name, rows in (("te", self.te), ("transformer", self.transformer), ("vae", self.vae)):
            nbytes[name] = round(self.rest_gb * 1e9)
            once[name] = [Use((name,), _REST_SECONDS, workspace)]
            for index, row in enumerate(rows):
                for number in range(row.count):
                    block = f"{name}.row_{index}.{number}"
                    nbytes[block] = round(row.gb * 1e9)
                    once[name].append(Use((name, block), row.seconds, workspace))
        loop = once["transformer"] * self.passes * (steps or self.steps)
        budget = int(share * sum(nbytes.values()))
        return Instance(nbytes, [*once["te"], *loop, *once["vae"]], budget, LINK * 1e9)


SHAPES = {
    # T5-XXL; 19 double and 38 single blocks: 12.9 and 10.8 GB, 0.2 and 0.4 s a step.
    "flux": Shape(
        te=(Row(24, 0.397, 0.004),),
        transformer=(Row(19, 0.679, 0.0105), Row(38, 0.283, 0.0105)),
        vae=(Row(4, 0.04, 0.075),),
        steps=6,
    ),
    # UMT5-XXL; 40 blocks, 28 GB, 13 s a pass: the copies hide.
    "wan": Shape(
        te=(Row(24, 0.473, 0.007),),
        transformer=(Row(40, 0.7, 0.325),),
        vae=(Row(4, 0.12, 1.2),),
        passes=2,
        steps=2,
    ),
    # Qwen2.5-VL 7B; 60 blocks, 40.8 GB, 1.3 s a pass.
    "qwen": Shape(
        te=(Row(28, 0.575, 0.005),),
        transformer=(Row(60, 0.68, 0.0217),),
        vae=(Row(4, 0.06, 0.1),),
        passes=2,
        steps=2,
    ),
    # Two CLIPs; a UNet: 92 % of the bytes in three places, where 69 % of the time is spent.
    "sdxl": Shape(
        te=(Row(12, 0.01, 0.001), Row(32, 0.04, 0.001)),
        transformer=(
            Row(4, 0.05, 0.005),
            Row(20, 0.078, 0.0014),
            Row(10, 0.078, 0.0014),
            Row(30, 0.078, 0.0014),
            Row(4, 0.05, 0.005),
        ),
        vae=(Row(4, 0.04, 0.075),),
        steps=3,
        rest_gb=0.05,
        scratch_gb=0.1,
    ),
}
