"""Captures in several threads come one after the other, and leave torch as it was."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

import kvpass
from tests.decoders.catalogue import DECODERS
from tests.parity.harness import CONFIG, SEED

NAMES = ("nn.MultiheadAttention without weights", "GQA by repeat_interleave")
DETECT = transformer._detect_is_causal_mask


class BranchesOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x if x.sum() > 0 else -x


def is_whole() -> bool:
    return torch.backends.mha.get_fastpath_enabled() and transformer._detect_is_causal_mask is DETECT


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_models_are_compiled_in_threads(count: int) -> None:
    barrier = threading.Barrier(count)

    def work(number: int) -> bool:
        model = DECODERS[NAMES[number % len(NAMES)]](SEED)
        barrier.wait()
        verification = kvpass.compile(model, CONFIG).report.verification
        return verification is not None and verification.passed

    with ThreadPoolExecutor(count) as pool:
        assert list(pool.map(work, range(count))) == [True] * count
    assert is_whole()


@pytest.mark.slow
def test_a_failed_capture_leaves_nothing_behind() -> None:
    for _ in range(2):
        with pytest.raises(kvpass.RefusedError):
            kvpass.compile(BranchesOnData().eval(), CONFIG)
        assert is_whole()
    assert kvpass.compile(DECODERS[NAMES[0]](SEED), CONFIG).report.verification
    assert is_whole()
