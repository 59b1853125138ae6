"""The memo serves what was derived from these very contents, or derives it anew."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpass.kernels.reference import backend as reference
from kvpass.kernels.reference import naive
from kvpass.kernels.step_memo import StepMemo


def write_in_place(tensor: Tensor) -> None:
    tensor.add_(1)


def write_through_data(tensor: Tensor) -> None:
    tensor.data.add_(1)


def write_through_numpy(tensor: Tensor) -> None:
    tensor.numpy()[...] += 1


def write_raw_memory(tensor: Tensor) -> None:
    ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_int64))[0] += 1


def sums(memo: StepMemo[int], *tensors: Tensor) -> int:
    return memo.get(tensors, "sum", lambda: int(sum(tensor.sum() for tensor in tensors)))


@pytest.mark.parametrize("write", [write_in_place, write_through_data, write_through_numpy, write_raw_memory])
def test_a_write_behind_torchs_back_is_seen(write: Callable[[Tensor], None]) -> None:
    memo: StepMemo[int] = StepMemo()
    first, second = torch.tensor([3, 4]), torch.tensor([5])
    assert sums(memo, first, second) == 12
    write(first)
    assert sums(memo, first, second) == int(first.sum()) + 5 != 12


def test_equal_contents_are_a_hit_wherever_they_lie() -> None:
    memo: StepMemo[int] = StepMemo()
    tensor = torch.tensor([3, 4])
    assert sums(memo, tensor) == 7
    never: Callable[[], int] = lambda: pytest.fail("derived again")  # noqa: E731
    assert memo.get((tensor.clone(),), "sum", never) == 7


@pytest.mark.parametrize(
    "other", [torch.tensor([3, 4, 0]), torch.tensor([[3, 4]]), torch.tensor([3, 4], dtype=torch.int32)], ids=str
)
def test_another_shape_or_dtype_is_another_step(other: Tensor) -> None:
    memo: StepMemo[str] = StepMemo()
    assert memo.get((torch.tensor([3, 4]),), "key", lambda: "old") == "old"
    assert memo.get((other,), "key", lambda: "new") == "new"


def test_a_new_step_forgets_every_value_of_the_old() -> None:
    memo: StepMemo[str] = StepMemo()
    old, new = (torch.tensor([1]),), (torch.tensor([2]),)
    assert memo.get(old, "a", lambda: "old a") == "old a"
    assert memo.get(old, "b", lambda: "old b") == "old b"
    assert memo.get(new, "a", lambda: "new a") == "new a"
    assert memo.get(new, "b", lambda: "new b") == "new b"
    assert memo.get(old, "a", lambda: "old again") == "old again"


def test_a_value_that_cannot_be_derived_is_not_kept() -> None:
    memo: StepMemo[int] = StepMemo()
    tensors = (torch.tensor([1]),)
    with pytest.raises(ZeroDivisionError):
        memo.get(tensors, "key", lambda: 1 // 0)
    assert memo.get(tensors, "key", lambda: 5) == 5


@pytest.mark.parametrize("changed", ["block_tables", "seq_lens", "query_start"])
def test_attention_follows_a_step_that_changes_in_place(changed: str, random_step: Callable[..., Any]) -> None:
    step = random_step([20, 20, 20], [1, 2, 3], block_size=4)
    step.attend(reference.paged_attention, 0.3)
    if changed == "block_tables":
        step.block_tables.numpy()[:] = step.block_tables.flip(0).numpy()
    elif changed == "seq_lens":
        step.seq_lens.numpy()[:] = [19, 18, 17]
    else:
        step.query_start.numpy()[:] = [0, 3, 5, 6]
    want = step.attend(naive.paged_attention, 0.3)
    torch.testing.assert_close(step.attend(reference.paged_attention, 0.3).double(), want, rtol=2e-5, atol=2e-6)


def test_a_write_follows_slots_that_change_in_place() -> None:
    cache, slots = torch.zeros(3, 2, 4, 5), torch.tensor([1, 6])
    new = torch.ones(2, 2, 5)
    reference.write_cache(new, new, cache, cache.clone(), slots)
    slots.numpy()[:] = [11, 2]
    cache.zero_()
    reference.write_cache(new, new, cache, cache.clone(), slots)
    assert cache[2, :, 3].all()
    assert cache[0, :, 2].all()
    assert cache.sum() == 20


def test_threads_do_not_see_each_others_steps(random_step: Callable[..., Any]) -> None:
    steps = [random_step([9 + n, 14], [1, 1 + n], seed=n) for n in range(4)]
    wanted = [step.attend(naive.paged_attention, 0.3) for step in steps]
    wrong = []

    def attend(step: Any, want: Tensor) -> None:
        for _ in range(50):
            got = step.attend(reference.paged_attention, 0.3).double()
            if not torch.allclose(got, want, rtol=2e-5, atol=2e-6):
                wrong.append(step)

    threads = [threading.Thread(target=attend, args=pair) for pair in zip(steps, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
