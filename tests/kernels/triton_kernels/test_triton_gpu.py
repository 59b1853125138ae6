"""The Triton kernels on a GPU: numerics in every dtype, CUDA graphs, and no waiting for the device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kvpass.kernels.triton_kernels.launch import backend

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[3]


def test_random_calls_agree_with_float64() -> None:
    sweep = "-m benchmarks.kernel_sweep --backend triton --device cuda --cases 300"
    command = [sys.executable, *sweep.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def make_step(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """A decode step over two bfloat16 caches, 64 blocks of 16 each."""
    torch.manual_seed(0)
    caches = [torch.randn(64, 2, 16, 64, device="cuda").bfloat16() for _ in range(2)]
    tables = torch.randperm(64, device="cuda").view(4, 16)
    starts = torch.arange(5, device="cuda")
    query = torch.randn(4, 8, 64, device="cuda").bfloat16()
    return query, *caches, tables, torch.tensor(lengths, device="cuda"), starts


def test_a_graph_serves_steps_of_other_lengths_and_blocks() -> None:
    step = make_step([200, 3, 256, 17])
    backend.paged_attention(*step, 0.125)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.paged_attention(*step, 0.125)
    for lengths in ([1, 256, 100, 31], [256, 255, 1, 2]):
        step[4].copy_(torch.tensor(lengths, device="cuda"))
        step[3].copy_(torch.randperm(64, device="cuda").view(4, 16))
        graph.replay()
        torch.testing.assert_close(out, backend.paged_attention(*step, 0.125), rtol=0, atol=0)


def test_no_call_waits_for_the_device() -> None:
    step = make_step([200, 3, 256, 17])
    new = torch.randn(4, 2, 64, device="cuda").bfloat16()
    slots = torch.arange(4, device="cuda")
    shared = torch.tensor([0, 2, 4], device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")

    def run() -> None:
        backend.write_cache(new, new, step[1], step[2], slots)
        backend.paged_attention(*step, 0.125)
        backend.paged_attention_stats(*step, 0.125, mass=True)
        backend.cascade_attention(*step, *shared, 0.125)
        backend.copy_blocks([step[1], step[2]], slots[:2], slots[2:])
        backend.gather_cache(step[1], step[3], step[4], 64)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
