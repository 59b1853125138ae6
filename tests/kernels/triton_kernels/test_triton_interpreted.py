"""The Triton kernels in Triton's interpreter, against float64 on random calls.

In a process of its own: a read outside of a tensor ends the interpreter's process, and the switch is read when Triton
is imported. ``python -m benchmarks.kernel_sweep --backend triton`` runs as many cases as one likes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.cache_cases import CHECKS
from tests.kernels.random_cases import ATTENTIONS
from tests.kernels.rare_cases import RARE
from tests.kernels.settled_cases import NAMES

ROOT = Path(__file__).resolve().parents[3]


def run_interpreted(*command: str, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.slow
def test_random_calls_agree_with_float64(tmp_path: Path) -> None:
    sweep = ("-m", "benchmarks.kernel_sweep", "--backend", "triton", "--cases", "42", "--seed", "7")
    ran = run_interpreted(*sweep, "--results", str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "kernel_sweep_triton.json").read_text())
    assert {row["op"] for row in found["results"]} == {*ATTENTIONS, *CHECKS}
    assert set(found["options"]["by_format"]) == set(NAMES)


RARE_CALLS = """
from kvpass.kernels.triton_kernels.launch import backend
from tests.kernels.format_bounds import ROUNDINGS
from tests.kernels.rare_cases import RARE, find_case
for what, (op, names, _, _) in RARE.items():
    find_case(what, names[0]).check(getattr(backend, op), ROUNDINGS["interpreter"])
    print(what)
"""


@pytest.mark.slow
def test_rare_calls_agree_with_float64() -> None:
    ran = run_interpreted("-c", RARE_CALLS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.split("\n")[:-1] == [*RARE]


THROUGH_THE_OPS = """
import torch
from kvpass.kernels import ops
from kvpass.kernels.reference import naive
from kvpass.kernels.reference import backend as reference
from kvpass.kernels.triton_kernels.launch import backend
calls = []
for name in ("write_cache", "paged_attention"):
    kernel = getattr(backend, name)
    setattr(backend, name, lambda *a, _kernel=kernel, _name=name, **k: (calls.append(_name), _kernel(*a, **k))[1])
torch.manual_seed(0)
caches = [torch.zeros(4, 2, 16, 32, dtype=torch.uint8)[..., :20].contiguous() for _ in range(2)]
key, value = torch.randn(21, 2, 32), torch.randn(21, 2, 32)
torch.ops.kvpass.write_cache(key, value, *caches, torch.arange(21) + 16, "int4", "int4")
step = (torch.randn(3, 4, 32), *caches, torch.tensor([[1, 2]]), torch.tensor([21]), torch.tensor([0, 3]))
got = torch.ops.kvpass.paged_attention(*step, 0.2, key_format="int4", value_format="int4")
want = reference.paged_attention(*step, 0.2, key_format="int4", value_format="int4")
torch.testing.assert_close(got, want)
assert calls == ["write_cache", "paged_attention"], calls
try:
    torch.ops.kvpass.paged_attention(step[0].double(), *step[1:], 0.2, key_format="int4", value_format="int4")
except Exception as error:
    assert "float64: the kernels take" in str(error), error
else:
    raise AssertionError("a float64 query was served")
"""


def test_the_ops_reach_the_kernels_when_the_backend_is_forced() -> None:
    ran = run_interpreted("-c", THROUGH_THE_OPS, KVPASS_BACKEND="triton")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_wrong_kernel_is_caught_by_the_sweep() -> None:
    broken = (
        "import sys; sys.argv[1:] = '--backend triton --op paged_attention --format bfloat16 --cases 5'.split()\n"
        "from benchmarks import kernel_sweep\n"
        "from kvpass.kernels.triton_kernels.launch import attention_call\n"
        "real = attention_call.describe_caches\n"
        "attention_call.describe_caches = lambda call, target: {**real(call, target), 'KEY_A': 16, 'KEY_B': 0}\n"
        "sys.exit(kernel_sweep.main())\n"
    )
    ran = run_interpreted("-c", broken)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "off by more than their bounds" in ran.stdout
