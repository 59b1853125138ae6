"""Is any decoder that was written to be got wrong served wrong?

The table of `tests/adversarial` holds decoders made by an attacker of each rule of the passes: masks and positions that
are others at single lengths, operands that carry tokens where an op expects weights, weights that change after the
compile, forwards that notice the capture, outputs, ops with borrowed names. Each is compiled, and compared with the
original at every length that it names, before and after its change. Right and refused are good; wrong, or an error that
is none of kvpass's own, ends the run with 1.

    python -m benchmarks.adversarial --jobs 2
    python -m benchmarks.adversarial --only operand          # those whose class or name holds a word
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from kvpass.cli.terminal import output
from kvpass.quality.measure import write_result
from tests.adversarial.judge import judge
from tests.adversarial.parts import Attack
from tests.adversarial.table import ATTACKS, CONTROLS

OUTCOMES = ("right", "refused", "wrong", "crash")


def judged(name: str) -> dict[str, Any]:
    """What became of one attack, by its name."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    attack = next(a for a in (*ATTACKS, *CONTROLS) if a.name == name)
    start = time.process_time()
    verdict = judge(attack)
    return {
        "class": attack.klass,
        "attack": name,
        "outcome": verdict.outcome,
        "detail": verdict.detail[:200],
        "allowed": verdict.outcome in attack.allowed,
        "seconds": round(time.process_time() - start, 2),
    }


def chosen(words: list[str]) -> list[Attack]:
    """The attacks whose class or name holds one of the words; all without words."""
    table = (*ATTACKS, *CONTROLS)
    return [a for a in table if not words or any(word in f"{a.klass}: {a.name}" for word in words)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--only", nargs="+", default=[], help="words, of which a class or a name holds one")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    names = [attack.name for attack in chosen(options.only)]
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=60) as pool:
        for row in pool.imap_unordered(judged, names):
            rows.append(row)
            if not row["allowed"]:
                output().print(f"{row['outcome']}: {row['class']}: {row['attack']}: {row['detail']}", markup=False)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row["class"]][row["outcome"]] += 1
    table = Table(title="decoders written to be got wrong")
    for column in ("class", "attacks", *OUTCOMES):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, found in sorted(counts.items()):
        table.add_row(name, str(found.total()), *(str(found[outcome] or "") for outcome in OUTCOMES))
    output().print(table)
    bad = [row for row in rows if not row["allowed"]]
    if not options.only:
        rows.sort(key=lambda row: (row["class"], row["attack"]))
        summary = {name: dict(found) for name, found in sorted(counts.items())}
        path = write_result(options.results, "adversarial", {"attacks": len(rows), "by class": summary}, rows)
        output().print(f"written to {path}", soft_wrap=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
