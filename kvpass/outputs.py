"""Which of a forward's results are the logits: told by name, by the width of the vocabulary, or by being alone.

Never by being the first: hidden states may come before them, and may be as wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from kvpass.errors import InputError

NAME = "logits"
aten = torch.ops.aten


class Step(NamedTuple):
    """One step down into a result: an attribute by name, or an item by key or index."""

    key: Any
    is_attribute: bool = False


Path = tuple[Step, ...]


def logits_at(output: Any, path: Path) -> Tensor:
    """The tensor at a path that was found in another result of the same model.

    Raises:
        InputError: if there is none: the model returns something else for other lengths.
    """
    found = output
    try:
        for step in path:
            found = getattr(found, step.key) if step.is_attribute else found[step.key]
    except (AttributeError, LookupError, TypeError):
        found = None
    if isinstance(found, Tensor):
        return found
    raise InputError(f"the model returned its logits as {_spelt(path)} before, and now {_listed(output)}")


def find_logits(output: Any, batch: int, length: int, rows: frozenset[int] = frozenset()) -> Path:
    """Where the logits are in what a model returned for token ids ``[batch, length]``.

    Args:
        output: a tensor; or an object, mapping or sequence that holds it, nested or not.
        batch: sequences of the example.
        length: tokens of each.
        rows: of the tables that token ids are looked up in, as :func:`watched_tables` saw them.

    Raises:
        InputError: if there are none, or if they cannot be told from the rest.
    """
    if isinstance(output, Tensor):
        return ()
    for step in (Step(NAME, True), Step(NAME)):
        try:
            logits_at(output, (step,))
        except InputError:
            continue
        return (step,)
    found = {path: tensor for path, tensor in _tensors(output) if _is_candidate(tensor, batch, length, rows)}
    named = [path for path in found if path[-1].key == NAME]
    wide = [path for path, tensor in found.items() if int(tensor.shape[-1]) in rows]
    for chosen in (named, wide):
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            break
    else:
        if len(found) == 1 and (not rows or isinstance(output, Sequence)):
            return next(iter(found))
    known = f" (token ids are looked up in tables of {', '.join(map(str, sorted(rows)))} rows)" if rows else ""
    raise InputError(
        f"the model returns {_listed(output)} for token ids [{batch}, {length}], and which of it are the logits cannot "
        f"be told{known}: return the logits alone, or an object with .logits, or a dict with 'logits'"
    )


def _is_candidate(tensor: Tensor, batch: int, length: int, rows: frozenset[int]) -> bool:
    """Whether a tensor has a shape of logits: a row for each token or each sequence."""
    *outer, width = tensor.shape or (0,)
    forms = ([batch, length], [batch], [batch * length], [batch, 1])
    if not tensor.is_floating_point() or [int(size) for size in outer] not in forms:
        return False
    return bool(width != length or width in rows or len(outer) == 2)  # a number for each token, such as its loss


def _tensors(output: Any) -> Iterator[tuple[Path, Tensor]]:
    for step, part in _parts(output):
        if isinstance(part, Tensor):
            yield (step,), part
        else:
            yield from (((step, *path), tensor) for path, tensor in _tensors(part))


def _parts(output: Any) -> list[tuple[Step, Any]]:
    if isinstance(output, Mapping):
        return [(Step(key), part) for key, part in output.items()]
    if isinstance(output, Sequence) and not isinstance(output, (str, bytes)):
        return [(Step(index), part) for index, part in enumerate(output)]
    if isinstance(output, (type, torch.nn.Module)):
        return []
    return [(Step(name, True), part) for name, part in getattr(output, "__dict__", {}).items()]


def _spelt(path: Path) -> str:
    return "output" + "".join(f".{step.key}" if step.is_attribute else f"[{step.key!r}]" for step in path)


def _listed(output: Any) -> str:
    """``a tuple of output[0] [2, 11, 8] and output[1] [2, 11, 97]``."""
    found = [f"{_spelt(path)} {[int(size) for size in tensor.shape]}" for path, tensor in _tensors(output)]
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)}"
    return f"{type(output).__name__} of {', '.join(found[:8])}" if found else type(output).__name__


@dataclass
class _Lookups(TorchDispatchMode):
    """How many rows the tables have that certain token ids are looked up in."""

    ids: Tensor
    rows: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten.embedding, aten.index, aten.index_select) and args[0].dim() == 2:
            index = args[2] if func.overloadpacket is aten.index_select else args[1]
            first = index[0] if isinstance(index, (list, tuple)) else index
            if isinstance(first, Tensor) and first.data_ptr() == self.ids.data_ptr():
                self.rows.add(int(args[0].shape[0]))
        return func(*args, **(kwargs or {}))


def watched_tables(call: Callable[[], Any], ids: Tensor) -> tuple[Any, frozenset[int]]:
    """What a call returns, and how many rows each table has that ``ids`` are looked up in meanwhile."""
    lookups = _Lookups(ids)
    try:
        # what is compiled now would be found again by the capture
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), lookups:
            return call(), frozenset(lookups.rows)
    except Exception:  # an op that cannot be watched, or what the model itself raises
        with torch.no_grad():
            return call(), frozenset()
