"""A seeded sweep of random calls over every op, format and feature: ``python -m tests.kernels.sweep --help``.

Runs against one backend, through the ops themselves, and ends with exit code 1 on the first case that is wrong; the
seed in the message is all that is needed to run it again.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from kvpass.errors import InputError
from kvpass.kernels import ops
from kvpass.kernels.cpu import loader
from kvpass.measure import write_result
from tests.kernels.cache_cases import CHECKS
from tests.kernels.format_bounds import check_within_formats
from tests.kernels.random_cases import ATTENTIONS, attention_case
from tests.kernels.settled_cases import NAMES


def run_case(seed: int, op: str, formats: tuple[str, str], slack: float | None) -> None:
    """Make the case of this seed, and raise AssertionError if the op gets it wrong."""
    kernel = getattr(torch.ops.kvpass, op).default
    if op in CHECKS:
        CHECKS[op](kernel, seed, *formats)
    elif slack is None:
        check_within_formats(attention_case(seed, op, *formats), kernel)
    else:
        attention_case(seed, op, *formats).check(kernel, slack)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="reference", help="value of KVPASS_BACKEND; '' lets the table choose")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count up")
    parser.add_argument("--op", choices=(*ATTENTIONS, *CHECKS), help="only this op")
    parser.add_argument("--format", choices=NAMES, help="only this format; k4 for k4v2")
    parser.add_argument("--slack", type=float, default=1.0, help="factor of the bounds of attention, for kernels that "
                        "quantise queries or weights as well")  # fmt: skip
    parser.add_argument("--within-formats", action="store_true", help="allow attention what the formats' own rounding "
                        "implies, for the same kernels; of the cpu backend always so")  # fmt: skip
    parser.add_argument("--results", type=Path, help="folder for kernel_sweep_<backend>.json, with level and versions")
    chosen = parser.parse_args()
    slack = None if chosen.within_formats or chosen.backend == "cpu" else chosen.slack
    os.environ["KVPASS_BACKEND"] = chosen.backend
    level = cpu_level() if chosen.backend == "cpu" else None
    start, done = time.perf_counter(), Counter[str]()
    for seed in range(chosen.seed, chosen.seed + chosen.cases):
        pick = random.Random(~seed)
        op = chosen.op or pick.choice([name for name in ops.SCHEMAS if name in ATTENTIONS or name in CHECKS])
        formats = tuple(chosen.format or pick.choice(NAMES) for _ in range(2))
        try:
            run_case(seed, op, (formats[0], formats[1]), slack)
        except InputError as error:
            if "cannot be served by KVPASS_BACKEND" not in str(error):
                raise
            op = "refused"
        except AssertionError as error:
            print(f"seed {seed}: {op} {formats} is wrong\n{error}")
            return 1
        done[op] += 1
    refused = done.pop("refused", 0)
    took, counts = time.perf_counter() - start, dict(sorted(done.items()))
    print(f"{sum(done.values())} cases right, {refused} refused, in {took:.0f} s: {counts}")
    if chosen.results:
        name = "_".join(filter(None, ("kernel_sweep", chosen.backend, level)))
        options = {"cases": chosen.cases, "first_seed": chosen.seed, "level": level, "within_formats": slack is None}
        options["refused"] = refused
        rows = [{"op": op, "right": count} for op, count in sorted(done.items())]
        print(f"written to {write_result(chosen.results, name, options, rows)}")
    return 0


def cpu_level() -> str:
    """The level of instruction sets whose kernels are run."""
    return os.environ.get("KVPASS_CPU_ISA") or loader.supported_levels()[-1]


if __name__ == "__main__":
    sys.exit(main())
