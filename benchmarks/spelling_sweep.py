"""Random attentions, thousands of them: each must be rewritten right or refused.

`tests.grammar` draws a spelling for every stage of an attention: projections and packing, norms, positions, repeated
heads, scale, product and layout of the scores, softcap, bias, mask and how it is applied, softmax, product with the
values, what follows. Attentions are put together in models of sixteen, eight over the same queries, keys and values;
each has logits of its own. kvpass compiles and verifies the model; then the logits of prefill, chunks and decode, side
by side, are compared with a loop over the original without a cache. What is refused is left out and the rest compiled
again. Of every twelve models one is unsound throughout (a mask that shows later tokens, talking heads, a softmax over
queries, a scale by length): those must be refused, but for those in which the fault changes nothing (one head that is
mixed with itself; scores that are SDPA's own affair), which come out right.

An example counts as right only if another first token would have moved its last logits; else it is blind.

    python -m benchmarks.spelling_sweep --examples 2000
    python -m benchmarks.spelling_sweep --seed 1234     # one example, and the least of its choices that still fail
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

from kvpass.quality.measure import write_result
from tests.grammar.check import Verdict, judge
from tests.grammar.decoder import DEFAULTS, describe, draw
from tests.grammar.shape import Spec

PER_MODEL = 16
UNSOUND_EVERY = 12
RESULTS = Path(__file__).with_name("results")
NAME = "spelling_sweep"


def specs_of(model: int) -> list[Spec]:
    """The attentions of one model."""
    unsound = model % UNSOUND_EVERY == UNSOUND_EVERY - 1
    return [draw(seed, unsound) for seed in range(model * PER_MODEL, (model + 1) * PER_MODEL)]


def minimal(spec: Spec) -> Verdict:
    """The verdict on the least of a spec's choices that is still wrong."""
    verdict = judge([spec])[0]
    for choice, plain in DEFAULTS.items():
        if verdict.outcome == "wrong" and spec[choice] != plain:
            simpler = {**verdict.spec, choice: plain}
            try:
                found = judge([simpler])[0]
            except (RuntimeError, ValueError, TypeError):  # choices that do not go together
                continue
            verdict = found if found.outcome == "wrong" else verdict
    return verdict


def without_numbers(reason: str) -> str:
    """A reason to count by: the same for every position and size."""
    return re.sub(r"\d+", "N", reason)


class Tally:
    """Counts of verdicts, as they stand in the result."""

    def __init__(self, before: dict[str, object] | None = None) -> None:
        before = before or {}
        self.sound = Counter(before.get("sound", {}))  # type: ignore[arg-type]
        self.unsound = Counter(before.get("unsound", {}))  # type: ignore[arg-type]
        self.refused = Counter(before.get("refused though sound", {}))  # type: ignore[arg-type]
        self.reasons = Counter(before.get("refused as unsound", {}))  # type: ignore[arg-type]
        self.wrong: list[str] = list(before.get("wrong", []))  # type: ignore[call-overload]
        self.models = int(before.get("models", 0))  # type: ignore[call-overload]
        self.seconds = float(before.get("processor seconds", 0.0))  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: list[dict[str, object]]) -> Tally:
        """The sum of several results."""
        whole = cls()
        for part in map(cls, parts):
            whole.sound += part.sound
            whole.unsound += part.unsound
            whole.refused += part.refused
            whole.reasons += part.reasons
            whole.wrong += part.wrong
            whole.models += part.models
            whole.seconds += part.seconds
        return whole

    def add(self, verdicts: list[Verdict], seconds: float) -> None:
        for verdict in verdicts:
            unsound = verdict.spec["unsound"] != "none"
            (self.unsound if unsound else self.sound)[verdict.outcome] += 1
            if verdict.outcome == "refused":
                (self.reasons if unsound else self.refused)[without_numbers(verdict.detail)] += 1
            if verdict.outcome == "wrong":
                print(verdict, flush=True)
                self.wrong.append(str(minimal(verdict.spec)))
                print("  at least:", self.wrong[-1], flush=True)
        self.models += 1
        self.seconds += seconds

    def to_dict(self) -> dict[str, object]:
        return {
            "examples": self.sound.total() + self.unsound.total(),
            "sound": dict(self.sound),
            "unsound": dict(self.unsound),
            "wrong": self.wrong,
            "refused though sound": dict(self.refused.most_common()),
            "refused as unsound": dict(self.reasons.most_common()),
            "models": self.models,
            "processor seconds": round(self.seconds, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, help="one example alone")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on from the result that is there")
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th model, from I"
    )
    parser.add_argument("--join", type=Path, nargs="+", help="add up the results in these folders instead")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.seed is not None:
        unsound = options.seed // PER_MODEL % UNSOUND_EVERY == UNSOUND_EVERY - 1
        print(minimal(draw(options.seed, unsound)))
        return
    written = options.out / f"{NAME}.json"
    if options.join:
        tally = Tally.joined(
            [json.loads((folder / f"{NAME}.json").read_text())["results"][0] for folder in options.join]
        )
        write_result(options.out, NAME, {"per model": PER_MODEL}, [tally.to_dict()])
        return
    tally = Tally(json.loads(written.read_text())["results"][0] if options.resume and written.exists() else None)
    stop = time.monotonic() + 60 * options.minutes
    part, parts = options.part
    while PER_MODEL * tally.models < options.examples / parts and time.monotonic() < stop:
        start = time.process_time()
        verdicts = judge(specs_of(tally.models * parts + part))
        tally.add(verdicts, time.process_time() - start)
        write_result(options.out, NAME, {"per model": PER_MODEL}, [tally.to_dict()])
    print(json.dumps(tally.to_dict(), indent=2))
    print("each example:", describe(draw(0)))


if __name__ == "__main__":
    main()
