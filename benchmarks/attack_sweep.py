"""Random attacks on what kvpass proves, thousands of them: every one is refused or right, never wrong.

Three kinds take turns. *Operands*: chains of ops in which an operand that acts as a weight is made of all tokens; a
label that is accepted is held against the values, one token replaced at a time. *Lengths*: masks and positions with a
term that depends on the length; a meaning that is given is held against the mask at every length up to 130 and around
its numbers. *Parameters*: decoders whose tensors change while an engine serves them; what it says is held against the
changed model. About half of the operands and a third of the lengths are controls that hide nothing; how many of them
are refused is information, no failure.

    python -m benchmarks.attack_sweep --examples 2100 --seed 0
    python -m benchmarks.attack_sweep --only 1234     # one example, spelled out
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from kvpass.quality.measure import write_result
from tests.attack import lengths, operands, parameters
from tests.attack.verdict import KINDS, PER_SEED, Verdict

PER_CAPTURE = 50
AT_ONCE = 450  # examples after which the result is written: whole captures, and whole groups of changes
RESULTS = Path(__file__).with_name("results")
NAME = "attack_sweep"


def verdicts(numbers: range, kinds: Iterable[str] = KINDS) -> Iterator[Verdict]:
    """The verdicts on the examples of these numbers, kind after kind."""
    for kind in kinds:
        mine = [number for number in numbers if KINDS[number % len(KINDS)] == kind]
        if kind == "operands":
            for start in range(0, len(mine), PER_CAPTURE):
                yield from operands.judge([operands.draw_chain(n) for n in mine[start : start + PER_CAPTURE]])
        elif kind == "lengths":
            yield from lengths.judge([lengths.draw_example(n) for n in mine])
        else:
            for start in range(0, len(mine), parameters.CHANGES):
                group = mine[start : start + parameters.CHANGES]
                yield from parameters.judge(group[0], len(group))


def replay(number: int) -> Verdict:
    """One example again; a change after those of its family that come before it."""
    if KINDS[number % len(KINDS)] != "parameters":
        (found,) = verdicts(range(number, number + 1))
        return found
    place = number // len(KINDS) % parameters.CHANGES
    return list(parameters.judge(number - len(KINDS) * place, place + 1))[-1]


class Tally:
    """Counts of verdicts by kind, as they stand in the result."""

    def __init__(self) -> None:
        self.outcomes = {kind: Counter[str]() for kind in KINDS}
        self.controls = {kind: Counter[str]() for kind in KINDS}
        self.said: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds = dict.fromkeys(KINDS, 0.0)

    def add(self, verdict: Verdict, seconds: float) -> None:
        self.seconds[verdict.kind] += seconds
        if verdict.said:
            self.said[verdict.outcome] += 1
        self.outcomes[verdict.kind][verdict.outcome] += 1
        if verdict.control:
            self.controls[verdict.kind][verdict.outcome] += 1
        if verdict.outcome == "wrong":
            print(verdict, flush=True)
            self.wrong.append(str(verdict))

    def to_dict(self) -> dict[str, object]:
        return {
            "examples": sum(counts.total() for counts in self.outcomes.values()),
            "outcomes": {kind: dict(counts) for kind, counts in self.outcomes.items()},
            "of these, controls": {kind: dict(counts) for kind, counts in self.controls.items() if counts},
            "of these, after weights_changed()": dict(self.said),
            "wrong": self.wrong,
            "processor seconds": {kind: round(seconds, 1) for kind, seconds in self.seconds.items()},
        }

    def table(self) -> str:
        """One line for each kind."""
        heads = ("examples", "right", "refused", "wrong", "controls", "refused", "cpu s")
        lines = [f"{'kind':12}" + "".join(f"{head:>10}" for head in heads)]
        for kind in KINDS:
            counts, controls = self.outcomes[kind], self.controls[kind]
            found = [counts[outcome] for outcome in ("right", "refused", "wrong")]
            numbers = (counts.total(), *found, controls.total(), controls["refused"])
            lines.append(f"{kind:12}" + "".join(f"{n:10}" for n in (*numbers, round(self.seconds[kind]))))
        lines.append(
            f"one-entry changes through .data or numpy of a tensor that is only sampled: {self.said.total()}; "
            "engine.weights_changed() was said after each, as the manual asks"
        )
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=int, metavar="NUMBER", help="one example alone, by the number that it was printed with"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.only is not None:
        found = replay(options.only)
        print(found)
        return found.outcome == "wrong"
    tally, before = Tally(), time.process_time()
    first = options.seed * PER_SEED
    asked = {"examples": options.examples, "seed": options.seed, "kinds": list(options.kinds)}
    for start in range(first, first + options.examples, AT_ONCE):
        for verdict in verdicts(range(start, min(start + AT_ONCE, first + options.examples)), options.kinds):
            now = time.process_time()
            tally.add(verdict, now - before)
            before = now
        write_result(options.out, NAME, asked, [tally.to_dict()])
        print(tally.table(), flush=True)
    print(json.dumps(tally.to_dict(), indent=2))
    return bool(tally.wrong)


if __name__ == "__main__":
    raise SystemExit(main())
