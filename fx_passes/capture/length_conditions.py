"""How long a sequence may be for a captured graph to be the model: Python branches on the length were taken one way.

The capture leaves the conditions on batch and length under which its graph holds. Each is computed for all lengths up
to :data:`kvpass.fx_passes.graph.HORIZON`, so that no form of it (a quotient, a remainder, a square) hides one.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor, nn
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import TensorReferenceAnalysis

from kvpass.errors import CaptureError
from kvpass.fx_passes.graph import HORIZON, CapturedGraph, LogitsRows, shape_of

BATCHES = (2, 3)
FEW = 512  # lengths that are tried one by one, where a condition cannot be computed for all at once
# Where a condition fails at single lengths, model and graph are compared at this many, and on this many tokens in all.
LENGTHS_COMPARED, TOKENS_COMPARED = 16, 4096
LARGEST = 2**62  # beyond, int64 does not count any more


class _OnLengths(TensorReferenceAnalysis):
    """Conditions on tensors of lengths, with the functions of sizes that torch leaves out."""

    mod = staticmethod(torch.fmod)  # type: ignore[assignment]  # torch's own only raises
    python_mod = staticmethod(torch.remainder)

    @staticmethod
    def modular_indexing(base: Tensor, divisor: Tensor, modulus: Tensor) -> Tensor:
        """``(base // divisor) % modulus``."""
        return torch.remainder(torch.div(base, divisor, rounding_mode="floor"), modulus)

    @staticmethod
    def int_truediv(a: Tensor, b: Tensor) -> Tensor:
        """``a / b`` in float64."""
        return a.double() / b.double()


def longest_valid(captured: CapturedGraph, model: nn.Module, example_length: int) -> int | None:
    """The longest sequence for which the graph is the model's; None where no condition ends it.

    A condition that fails at one length and not at the next ones is most often one of the capture's own (a slice that
    happens to be the whole tensor). Such lengths are no limit if model and graph agree at each of them.

    Args:
        captured: the graph.
        model: takes the graph's inputs.
        example_length: tokens of the example that was captured.

    Raises:
        CaptureError: if a branch was taken that shorter sequences, or other batch sizes, would not take.
    """
    shapes = captured.fake_mode.shape_env
    assert shapes is not None
    conditions = {g.expr for g in shapes.guards if g.expr.free_symbols <= {captured.batch, captured.length}}
    agree: dict[int, bool] = {}
    limits: list[int] = []
    for condition in sorted(conditions, key=str):
        failing, tried = failing_lengths(condition, captured.batch, captured.length)
        broken = _first_apart(failing, captured, model, agree)
        if broken is not None and broken <= example_length:
            raise CaptureError(
                f"the forward takes another branch depending on the size of its input: the captured graph demands "
                f"{condition}, which does not hold for a sequence of {broken} tokens"
            )
        if broken is not None or tried < HORIZON:
            limits.append(tried if broken is None else broken - 1)
    return min(limits, default=None)


def failing_lengths(condition: sympy.Basic, batch: sympy.Symbol, length: sympy.Symbol) -> tuple[list[int], int]:
    """The first lengths of 2 or more at which a condition fails for a batch of 2 or 3, and the longest one tried."""
    tried = HORIZON
    while tried > FEW and not _is_exact(condition, {batch: max(BATCHES), length: tried}):
        tried //= 4
    lengths = torch.arange(2, tried + 1)
    try:
        holds = torch.ones_like(lengths, dtype=torch.bool)
        for size in BATCHES if batch in condition.free_symbols else BATCHES[:1]:
            values = {batch: torch.tensor(size), length: lengths}
            given = {symbol: values[symbol] for symbol in condition.free_symbols}
            holds &= sympy_interp(_OnLengths, given, condition)
        return lengths[~holds][:TOKENS_COMPARED].tolist(), tried
    except Exception:  # a function that torch does not compute on tensors, whatever it raises
        return [n for n in range(2, FEW + 1) if not _holds(condition, batch, length, n)], FEW


def _is_exact(condition: sympy.Basic, largest: dict[sympy.Symbol, int]) -> bool:
    """Whether no part of a condition is too large a number for int64."""
    parts = (part.subs(largest) for part in sympy.preorder_traversal(condition) if isinstance(part, sympy.Expr))
    return all(not part.is_number or not part.is_finite or abs(part) < LARGEST for part in parts)


def _holds(condition: sympy.Basic, batch: sympy.Symbol, length: sympy.Symbol, tokens: int) -> bool:
    return all(condition.subs({batch: size, length: tokens}) != sympy.false for size in BATCHES)


def _first_apart(failing: list[int], captured: CapturedGraph, model: nn.Module, agree: dict[int, bool]) -> int | None:
    """The first of the lengths at which model and graph were not seen to agree."""
    known, tokens = set(failing), 0
    for count, length in enumerate(failing):
        tokens += length
        alone = not known & {length + 1, length + 2, length + 3}
        if not alone or count >= LENGTHS_COMPARED or tokens > TOKENS_COMPARED:
            return length
        if length not in agree:
            agree[length] = _agree(captured, model, length)
        if not agree[length]:
            return length
    return None


def _agree(captured: CapturedGraph, model: nn.Module, length: int) -> bool:
    """Whether model and graph give the same logits for two sequences of one length."""
    device = captured.input_ids.meta["val"].device
    ids = torch.randint(int(shape_of(captured.output)[-1]), (2, length), generator=torch.Generator().manual_seed(0))
    for tokens in (ids.to(device), (ids % 2).to(device)):  # a model may know fewer tokens than it returns logits for
        inputs = [tokens]
        if captured.position_ids is not None:
            inputs.append(torch.arange(length, device=device).expand_as(tokens))
        with torch.no_grad():
            try:
                wanted, got = model(*inputs), captured.module(*inputs)[0]
            except (RuntimeError, IndexError, ValueError):
                continue
        got = (got[:, -1:] if captured.rows is LogitsRows.LAST else got).reshape(wanted.shape)
        scale = max(float(wanted.abs().max()), 1e-6)
        return bool((wanted - got).abs().max() <= 1e-3 * scale)
    return False
