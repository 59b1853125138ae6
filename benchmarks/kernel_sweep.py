"""Random calls of every kernel, thousands of them, against float64: one command for every backend.

Each case draws an op, formats, shapes and features by a seed of its own, and goes through the op itself. Caches are NaN
outside of the sequences, block tables lead out of the caches past their ends, and outputs are NaN before they are
written. The error has to be within the bound that the formats imply: `tests/kernels/format_bounds.py`.

    python -m benchmarks.kernel_sweep --backend reference
    python -m benchmarks.kernel_sweep --backend cpu --isa avx512        # without --isa the best level of the machine
    python -m benchmarks.kernel_sweep --backend triton                  # in Triton's interpreter, a quarter of an hour
    python -m benchmarks.kernel_sweep --backend triton --part 1 2       # its first half
    python -m benchmarks.kernel_sweep --backend triton --device cuda    # compiled, on a GPU

Ends with exit code 1 at the first case that is wrong, and names its seed: ``--seed N --cases 1`` runs it again. The
seed that the interpreter works on stands on stderr, since a read outside of its tensors ends its process.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from kvpass.errors import InputError
from kvpass.kernels import backends
from kvpass.kernels.cpu import loader
from kvpass.quality.measure import write_result
from tests.kernels.cache_cases import CHECKS
from tests.kernels.format_bounds import ROUNDINGS, Rounding
from tests.kernels.random_cases import ATTENTIONS, attention_case
from tests.kernels.settled_cases import NAMES

TURNS = (*ATTENTIONS, *CHECKS, *ATTENTIONS, "paged_attention")  # the ops of cases that follow one another
Kernel = Callable[..., Any]


def draw(seed: int, op: str | None, name: str | None) -> tuple[str, tuple[str, str]]:
    """The op of a seed's case, and the formats of its keys and values, as far as they are not given."""
    pick = random.Random(~seed)
    first = name or pick.choice(NAMES)
    return op or TURNS[seed % len(TURNS)], (first, name or (first if pick.random() < 0.5 else pick.choice(NAMES)))


def run_case(seed: int, op: str, formats: tuple[str, str], kernel: Kernel, rounding: Rounding) -> float:
    """The largest error of a case as a part of its bound.

    Raises:
        AssertionError: if the kernel gets the case wrong.
    """
    if op in CHECKS:
        return CHECKS[op](kernel, seed, *formats, rounding=rounding)
    return attention_case(seed, op, *formats).check(kernel, rounding)


def on_device(kernel: Kernel, device: str) -> Kernel:
    """A kernel that takes tensors of the CPU and works on copies on ``device``."""

    def run(*arguments: Any, **named: Any) -> Any:
        there = tree_map_only(Tensor, lambda tensor: tensor.to(device, copy=True), (arguments, named))
        found = kernel(*there[0], **there[1])
        for before, after in zip(tree_leaves((arguments, named)), tree_leaves(there), strict=True):
            if isinstance(before, Tensor):
                before.copy_(after)
        return tree_map_only(Tensor, Tensor.cpu, found)

    return run


def on_threads(kernel: Kernel, seed: int) -> Kernel:
    """A kernel that divides its work among one to four threads, however many cores there are."""

    def run(*arguments: Any, **named: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(random.Random(seed).choice((1, 1, 2, 4)))
        try:
            return kernel(*arguments, **named)
        finally:
            torch.set_num_threads(before)

    return run


def vary_targets(seed: int) -> None:
    """Let the interpreter's next call be laid out as for some GPU: tiles, programs and fp8 differ between them."""
    # after the interpreter was switched on
    from kvpass.kernels.triton_kernels.launch import backend, launch, tuning

    pick = random.Random(seed)
    processors, native_fp8 = pick.randint(1, 6), pick.random() < 0.5
    target = launch.Target(pick.choice(tuple(tuning.TILES)), processors, native_fp8, interpreted=True)
    backend.find_target = lambda device: target


def prepare(backend: str, isa: str | None, device: str) -> tuple[str, Rounding]:
    """Force a backend; its name in results, and what it rounds."""
    os.environ["KVPASS_BACKEND"] = backend
    if backend == "cpu":
        if isa:
            os.environ["KVPASS_CPU_ISA"] = isa
        return f"cpu_{os.environ.get('KVPASS_CPU_ISA') or loader.supported_levels()[-1]}", ROUNDINGS["cpu"]
    if backend == "triton" and device == "cpu":
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError("Triton was imported before its interpreter was switched on: set TRITON_INTERPRET=1")
        os.environ["TRITON_INTERPRET"] = "1"
        return "triton", ROUNDINGS["interpreter"]
    return backend if device == "cpu" else f"{backend}_{device}", ROUNDINGS[backend]


@dataclass
class Found:
    """What a sweep has found.

    Attributes:
        last: the seed of the last case.
        right: cases of each op that were right.
        refused: cases of each op that the backend does not serve.
        met: cases in which each format occurred.
        worst: the largest error of each op, as a part of its bound.
    """

    last: int = -1
    right: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def sweep(chosen: argparse.Namespace, rounding: Rounding) -> Found:
    """Run cases until as many as were asked for are right.

    Raises:
        AssertionError: naming the seed of the first that is wrong.
    """
    found, (part, parts) = Found(), chosen.part
    for seed in itertools.count(chosen.seed + part - 1, parts):
        if found.right.total() * parts >= chosen.cases:
            break
        found.last = seed
        op, formats = draw(seed, chosen.op, chosen.format)
        kernel = getattr(torch.ops.kvpass, op).default
        if chosen.device != "cpu":
            kernel = on_device(kernel, chosen.device)
        elif chosen.backend == "cpu":
            kernel = on_threads(kernel, seed)
        elif chosen.backend == "triton":
            print(f"\rseed {seed}", end="", file=sys.stderr, flush=True)
            vary_targets(seed)
        try:
            found.worst[op] = max(found.worst[op], run_case(seed, op, formats, kernel, rounding))
        except InputError as error:
            if "cannot be served by KVPASS_BACKEND" not in str(error):
                raise
            found.refused[op] += 1
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {op} {formats} is wrong\n{error}") from error
        else:
            found.right[op] += 1
            found.met.update(set(formats))
    return found


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=[row.name for row in backends.BACKENDS], default="reference")
    parser.add_argument("--isa", help="of the cpu backend: a level of KVPASS_CPU_ISA")
    parser.add_argument("--device", default="cpu", help="cuda for the compiled Triton kernels")
    parser.add_argument("--cases", type=int, default=2000, help="that have to be right; refused ones do not count")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count up")
    parser.add_argument("--part", type=int, nargs=2, metavar=("I", "N"), default=(1, 1), help="every N-th case alone")
    parser.add_argument("--op", choices=sorted(set(TURNS)), help="only this op")
    parser.add_argument("--format", choices=NAMES, help="only this format; k4 for k4v2")
    parser.add_argument(
        "--results", type=Path, help="folder for kernel_sweep_<backend>.json, such as benchmarks/results"
    )
    chosen = parser.parse_args()
    name, rounding = prepare(chosen.backend, chosen.isa, chosen.device)
    torch.set_num_threads(1)  # the tensors are small: more would only wait for each other
    start = time.perf_counter()
    try:
        found = sweep(chosen, rounding)
    except AssertionError as error:
        print(f"\n{error}")
        return 1
    seconds, right = round(time.perf_counter() - start), dict(sorted(found.right.items()))
    print(f"\n{found.right.total()} cases right, {found.refused.total()} refused, in {seconds} s: {right}")
    if chosen.results:
        write(chosen, f"kernel_sweep_{name}", found, seconds)
    return 0


def write(chosen: argparse.Namespace, name: str, found: Found, seconds: int) -> None:
    """Write a file of results, one row for each op."""
    part, parts = chosen.part
    device = {} if chosen.device == "cpu" else {"device": torch.cuda.get_device_name()}
    options = {
        "cases": found.right.total(), "seeds": [chosen.seed + part - 1, found.last], "every": parts, **device,
        "by_format": dict(sorted(found.met.items())), "seconds": seconds,
    }  # fmt: skip
    rows = [
        {"op": op, "right": found.right[op], "refused": found.refused[op], "worst_part_of_bound": round(worst, 3)}
        for op, worst in sorted(found.worst.items())
    ]
    name += f"_part{part}of{parts}" if parts > 1 else ""
    print(f"written to {write_result(chosen.results, name, options, rows)}")


if __name__ == "__main__":
    sys.exit(main())
