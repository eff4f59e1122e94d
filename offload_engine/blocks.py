"""Where a component can be cut: its repeated blocks, found from the module itself.

[Note: blocks] A list of modules (ModuleList, Sequential) in which a class comes twice is a row of
blocks. A block that consists of further rows, as the down blocks of a UNet do, is cut into those.
What is outside of all blocks is the rest: needed whenever the component runs. Neighbours in a row
that are too small to be worth a copy of their own move as one.

[Note: parts] A block runs as one, but need not move as one: its layers are dealt out to a few parts
of about the same size. So a part of each block can stay and the rest of it stream, and what is to
come next takes room by the part and not by the block.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from .errors import ComponentError
from .segments import Scan, scan, sharing_scans

_MOSTLY = 0.75  # of a block's bytes must be in its own rows for it to be cut into them
_LEAST_BLOCK = 1 / 128  # of the component: smaller neighbours move as one
_LEAST_PART = 1 / 256  # the same: parts are about that large or larger
_MOST_PARTS = 4  # of a block
_CRUMB = 1 / 8  # of the least part: what is smaller is not worth a copy of its own

Block = tuple[str, tuple[nn.Module, ...]]  # path in the component, the modules that move as one


def find_blocks(component: nn.Module) -> list[Block]:
    """The blocks of ``component``, in the order of its definition; see [Note: blocks]."""
    rows = _rows(component, "")
    return _untied(component, _merged(rows, _nbytes([component]) * _LEAST_BLOCK))


def named_blocks(component: nn.Module, name: str, paths: Iterable[str]) -> list[Block]:
    """The blocks at ``paths`` below ``component``, which is called ``name``: each item of a list,
    any other module as a whole. Raises ComponentError for a path that does not exist."""
    found: dict[nn.Module, str] = {}
    modules = dict(component.named_modules())
    for path in paths:
        if path not in modules or not path:
            near = difflib.get_close_matches(path, filter(None, modules), n=3, cutoff=0.4)
            said = ", ".join(repr(f"{name}.{each}") for each in near) or "none"
            raise ComponentError(
                f"blocks names {f'{name}.{path}'!r}, which does not exist; near matches: {said}.",
                names=[f"{name}.{path}"],
            )
        row = modules[path]
        items = row.named_children() if _is_row(row) else [("", row)]
        for number, block in items:
            if _nbytes([block]):
                found.setdefault(block, f"{path}.{number}" if number else path)
    inside = {m for block in found for m in block.modules() if m is not block}
    return _untied(component, [(p, (b,)) for b, p in found.items() if b not in inside])


def parts_of(block: Block, component_nbytes: int) -> list[tuple[nn.Module, ...]]:
    """The layers in each part of ``block``, but for the first, to which belongs all that is in no
    other; see [Note: parts]. Empty for a block that moves as one. ``component_nbytes``: of all
    weights of the component that it is in."""
    _, modules = block
    nbytes, least = _nbytes(modules), max(1, component_nbytes * _LEAST_PART)
    count = min(_MOST_PARTS, int(nbytes / least))
    layers = list(dict.fromkeys(layer for module in modules for layer in _layers(module)))
    own = scan(modules, without=layers)
    groups = sharing_scans([own, *(scan([layer]) for layer in layers)])
    free = [layers[group[0] - 1] for group in groups if len(group) == 1 and group[0]]
    sizes = {layer: _nbytes([layer]) for layer in free}
    parts: list[list[nn.Module]] = [[] for _ in range(count)]
    totals = [nbytes - sum(sizes.values()), *[0] * (count - 1)]
    for layer in sorted(free, key=lambda layer: -sizes[layer]) if count > 1 else ():
        lightest = totals.index(min(totals))
        totals[lightest] += sizes[layer]
        parts[lightest].append(layer)
    found = zip(parts[1:], totals[1:], strict=True)
    return [tuple(part) for part, total in found if total > _CRUMB * least]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below ``module`` that have none below them."""
    for child in module.children():
        if any(child.children()):
            yield from _layers(child)
        else:
            yield child


def _is_row(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _rows(module: nn.Module, path: str) -> list[list[Block]]:
    """The rows of blocks in ``module``, which is at ``path`` ("" or "a.b.")."""
    if _is_row(module) and _repeats(module):
        return _row(module, path)
    children = module.named_children()
    return [row for name, child in children for row in _rows(child, f"{path}{name}.")]


def _row(row: nn.Module, path: str) -> list[list[Block]]:
    """The rows in ``row``: those inside of its blocks, and what is left of it."""
    rows: list[list[Block]] = []
    whole: list[Block] = []
    for number, block in row.named_children():
        nbytes = _nbytes([block])
        if not nbytes:
            continue
        inner = _rows(block, f"{path}{number}.")
        parts = [m for line in inner for _, modules in line for m in modules]
        if parts and _nbytes(parts) >= _MOSTLY * nbytes:
            rows += inner
        else:
            whole.append((f"{path}{number}", (block,)))
    return [*rows, whole]


def _repeats(row: nn.Module) -> bool:
    """Whether a class of modules that have parts of their own comes twice in ``row``."""
    classes = Counter(type(block) for block in row.children() if any(block.children()))
    return any(count > 1 for count in classes.values())


def _merged(rows: Iterable[list[Block]], least_nbytes: float) -> Iterator[Block]:
    for row in rows:
        path, held = "", list[nn.Module]()
        for name, modules in row:
            path, held = path or name, [*held, *modules]
            if _nbytes(held) >= least_nbytes:
                yield path, tuple(held)
                path, held = "", []
        if held:
            yield path, tuple(held)


def _untied(component: nn.Module, blocks: Iterable[Block]) -> list[Block]:
    """``blocks`` without those that share weights with the rest; those that share weights with
    each other move as one."""
    blocks = list(blocks)
    rest = scan([component], without=[m for _, modules in blocks for m in modules])
    groups = sharing_scans([rest, *(scan(modules) for _, modules in blocks)])
    found = []
    for group in groups:
        members = [blocks[index - 1] for index in group if index]
        if 0 not in group:
            found.append((members[0][0], tuple(m for _, modules in members for m in modules)))
    return found


def rest_of(component: nn.Module, blocks: Sequence[Block]) -> Scan:
    """What of ``component`` is outside of ``blocks``."""
    return scan([component], without=[m for _, modules in blocks for m in modules])


def least_nbytes(component: nn.Module, blocks: Sequence[Block]) -> int:
    """The rest and the largest block: what must be on the device at once."""
    rest = sum(t.nbytes for t in rest_of(component, blocks).all_tensors)
    return rest + max((_nbytes(modules) for _, modules in blocks), default=0)


def _nbytes(modules: Iterable[nn.Module]) -> int:
    return sum(tensor.nbytes for tensor in scan(modules).all_tensors)
