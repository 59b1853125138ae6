"""The gate that compiles Triton kernels ahead of time lets good kernels pass and stops one that spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "triton_aot.json"


def run_gate(*options: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "benchmarks/triton_aot.py", "--targets", "sm_90", *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_decode_and_write_compile_without_spills() -> None:
    ran = run_gate("--quick")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for kernel in ("schedule_kernel", "attention_kernel", "merge_kernel", "write_kernel"):
        assert f"sm_90 {kernel}" in ran.stdout


@pytest.mark.slow
def test_a_kernel_that_spills_is_stopped() -> None:
    ran = run_gate("--control")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "spills" in ran.stdout


def test_what_is_committed_has_no_fault() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["kernels"]
    assert {row["op"] for row in rows} >= {
        "paged",
        "latent",
        "cascade",
        "mass",
        "write",
        "fused",
        "gather",
        "copy",
        "settle",
    }
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["faults"] == [], row
