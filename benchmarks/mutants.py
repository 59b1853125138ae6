"""Faults planted in the passes, one at a time: what catches each.

A mutant edits one function (`tests/mutation/mutants.py`) and names a decoder on which it must show: one of the
catalogue, which then must be refused, fail the verification, or give other tokens than a loop without a cache; or, for
a fault that weakens a proof, one that must be refused, which then must fail the verification or be refused by another
rule. A mutant that nothing catches is a hole; the command ends with 1.

    python -m benchmarks.mutants
    python -m benchmarks.mutants --only "scale dropped"     # the others stay in the result as they are
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

from kvpass.quality.measure import write_result
from tests.mutation.mutants import MUTANTS, judge


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(MUTANTS), default=list(MUTANTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in options.only:
        mutant, start = MUTANTS[name], time.process_time()
        caught = judge(mutant)
        print(f"{name}: {caught.by} {caught.detail} ({time.process_time() - start:.1f} s)", flush=True)
        found = {"where": mutant.where, "decoder": mutant.probe, "caught by": caught.by, "how": caught.detail}
        results = {name: {"fault": name, **found}}
        written = options.out / "mutants.json"
        before = json.loads(written.read_text())["results"] if written.exists() else []
        results = {result["fault"]: result for result in before if result["fault"] in MUTANTS} | results
        ordered = [results[fault] for fault in MUTANTS if fault in results]
        counts = Counter(result["caught by"] for result in ordered)
        write_result(options.out, "mutants", {"mutants": len(MUTANTS), "caught by": dict(counts)}, ordered)
    return 1 if counts["nothing"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
