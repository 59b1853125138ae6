"""What a caller of an exported step may get wrong gives NaN, and no text."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kvpass
from kvpass.exporters.dialects.contracts import Contract, Growing, Paged, Static
from kvpass.exporters.dialects.exported_step import ExportedStep
from kvpass.exporters.dialects.lowerings import Step
from kvpass.exporters.dialects.plain_ops import PLAIN

PLAN = kvpass.CachePlan((), block_size=8, vocab_size=97, max_length=40, forbidden_tokens=(5,))
PAGED, WIDE, STATIC, GROWING = Paged(), Paged(says_widest=True), Static(32), Growing()


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def paged(new: Tensor, lens: Tensor, ids: Tensor, *more: Tensor) -> list[Tensor]:
    return [ids, new, lens, torch.zeros(1, len(new), 8, dtype=torch.int64), new.cumsum(0) - 1, *more]


IDS, ROWS = ints(1, 2, 3, 4), torch.tensor([[1, 2, 3], [4, 6, 7]])
CALLS: dict[str, tuple[Contract, list[Tensor], bool]] = {
    "paged": (PAGED, paged(ints(3, 1), ints(3, 40), IDS), True),
    "longer than the proof": (PAGED, paged(ints(3, 1), ints(3, 41), IDS), False),
    "an id that may not occur": (PAGED, paged(ints(3, 1), ints(3, 9), ints(1, 5, 3, 4)), False),
    "more new tokens than tokens": (PAGED, paged(ints(3, 1), ints(2, 9), IDS), False),
    "a sequence without a new token": (PAGED, paged(ints(4, 0), ints(4, 9), IDS), False),
    "columns": (WIDE, paged(ints(3, 1), ints(3, 9), IDS, torch.arange(3)), True),
    "more columns than needed": (WIDE, paged(ints(3, 1), ints(3, 9), IDS, torch.arange(5)), True),
    "too few columns": (WIDE, paged(ints(3, 1), ints(3, 9), IDS, torch.arange(2)), False),
    "static": (STATIC, [ROWS, ints(0, 29), ints(3, 1)], True),
    "padding beyond the context": (STATIC, [ROWS, ints(0, 30), ints(3, 1)], False),
    "more new tokens than columns": (STATIC, [ROWS, ints(0, 9), ints(3, 4)], False),
    "an id that may not occur, as padding": (STATIC, [torch.tensor([[1, 2, 5]]), ints(0), ints(2)], True),
    "an id that may not occur, in a row": (STATIC, [torch.tensor([[1, 2, 5]]), ints(0), ints(3)], False),
    "growing": (GROWING, [ROWS, torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])], True),
    "padding at the end": (GROWING, [ROWS, torch.tensor([[1] * 5, [1, 1, 1, 1, 0]])], False),
    "longer than the proof, growing": (GROWING, [ROWS, torch.ones(2, 41, dtype=torch.int64)], False),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_step_that_is_not_proven_does_not_fit(name: str) -> None:
    contract, values, fits = CALLS[name]
    past = torch.zeros(2, 1, 2, 4)
    step = contract.step(PLAN, values, [past])
    assert isinstance(step, Step) and bool(step.fits) is fits


def test_its_logits_are_nan(engines: Callable[[str], kvpass.Engine]) -> None:
    module = engines("window by distance, float mask").module
    assert isinstance(module, kvpass.PagedModule)
    step = ExportedStep(module, PLAIN, PAGED, gives_caches=False)
    caches = [torch.zeros([8 if isinstance(size, str) else size for size in port.shape]) for port in step.ports[5:]]
    tables = torch.arange(8).expand(len(module.plan.group_windows), 1, 8).contiguous()

    def logits(new: int, length: int) -> Tensor:
        with torch.no_grad():
            found: Tensor = step(ints(1, 2, 3), ints(new), ints(length), tables, ints(2), *caches)
        return found

    assert logits(3, 3).isfinite().all()
    assert logits(3, 2).isnan().all()
