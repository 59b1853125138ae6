"""Right or refused: what kvpass makes of random attentions, each layer judged by logits of its own."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kvpass
from tests.grammar.decoder import FAMILY, VOCAB, Chain, describe
from tests.grammar.shape import Spec
from tests.parity.paged_logits import paged_logits

CONFIG = kvpass.CacheConfig(block_size=4, num_blocks=24)
LENGTHS = (5, 12, 21)
STEPS = [(0, 11, 6), (3, 0, 9), (1, 1, 1), (1, 0, 1), (0, 0, 3), (0, 0, 1)]  # prefill, chunks and decode side by side
TOLERANCE = 2e-4  # of the largest logit
TIE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """What became of one attention.

    Attributes:
        spec: its choices.
        outcome: "right", "refused", "wrong" or "blind" (right, and the history does not move its logits: no proof).
        detail: the reason of the refusal, or what is wrong.
    """

    spec: Spec
    outcome: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.outcome} ({self.detail}): seed {self.spec['seed']}: {describe(self.spec)}"


def judge(specs: list[Spec], verify: bool = True) -> list[Verdict]:
    """Compile the attentions together, leave out those that are refused, and compare the rest with the original."""
    verdicts: list[Verdict] = []
    pending = list(specs)
    while pending:
        try:
            engine = kvpass.compile(Chain(pending), CONFIG, verify=verify)
        except kvpass.VerificationError as error:
            report = error.report.verification
            assert report is not None
            failed = [check for check in report.checks if check.startswith("FAILED")]
            return verdicts + _apart(pending, verify, Verdict(pending[0], "wrong", f"verification: {failed[0]}"))
        except kvpass.RefusedError as error:
            refused = _refused(error, pending)
            if not refused:
                return verdicts + _apart(pending, verify, _unplaced(pending[0], error))
            verdicts += [Verdict(pending[i], "refused", reason) for i, reason in refused.items()]
            pending = [spec for i, spec in enumerate(pending) if i not in refused]
        except Exception as error:
            return verdicts + _apart(pending, verify, Verdict(pending[0], "wrong", f"crash: {error!r}"[:300]))
        else:
            return verdicts + _compare(Chain(pending), engine, pending)
    return verdicts


def _apart(specs: list[Spec], verify: bool, verdict: Verdict) -> list[Verdict]:
    """The verdict of a model of one; halves by themselves where there are several."""
    if len(specs) == 1:
        return [verdict]
    middle = len(specs) // 2
    return judge(specs[:middle], verify) + judge(specs[middle:], verify)


def _refused(error: kvpass.RefusedError, specs: list[Spec]) -> dict[int, str]:
    """Reasons by attention; what is refused before the heads part is refused for the whole family."""
    families = [list(group) for _, group in itertools.groupby(range(len(specs)), lambda i: specs[i]["seed"] // FAMILY)]
    found: dict[int, str] = {}
    for refusal in error.report.refusals:
        match = re.match(r"layers\.(\d+)(?:\.attentions\.(\d+))?", refusal.module_path)
        if match:
            family = families[int(match[1])]
            for i in family if match[2] is None else family[int(match[2]) :][:1]:
                found.setdefault(i, f"{refusal.pass_name}: {refusal.reason}")
    return found


def _unplaced(spec: Spec, error: kvpass.RefusedError) -> Verdict:
    refusals = error.report.refusals
    text = "; ".join(f"{refusal.pass_name}: {refusal.reason}" for refusal in refusals) or "no refusal at all"
    broken = not refusals or any("defect of kvpass" in refusal.reason for refusal in refusals)
    return Verdict(spec, "wrong" if broken else "refused", text.splitlines()[0][:300])


@torch.no_grad()
def _compare(model: nn.Module, engine: kvpass.Engine, specs: list[Spec]) -> list[Verdict]:
    draw = random.Random(specs[0]["seed"])
    prompts = [[draw.randrange(VOCAB) for _ in range(n)] for n in LENGTHS]
    paged = paged_logits(engine, prompts, STEPS)
    wanted = [_naive(model, prompt) for prompt in prompts]
    spoiled = [[(prompt[0] + 11) % VOCAB, *prompt[1:-1], prompt[-1]] for prompt in prompts[:1]]
    moved = (model(torch.tensor(spoiled))[0, -1] - wanted[0][-1]).abs()
    verdicts = []
    for i, spec in enumerate(specs):
        own = slice(i * VOCAB, (i + 1) * VOCAB)
        detail = _difference([p[:, own] for p in paged], [w[:, own] for w in wanted])
        blind = float(moved[own].max()) < 1e-3
        verdicts.append(Verdict(spec, "wrong" if detail else ("blind" if blind else "right"), detail))
    return verdicts


def _naive(model: nn.Module, prompt: list[int]) -> Tensor:
    """Logits `[S, V]` of a loop without a cache: each row from a sequence that ends there."""
    ids = torch.tensor([prompt])
    return torch.stack([model(ids[:, : n + 1])[0, -1] for n in range(len(prompt))])


def _difference(got: list[Tensor], wanted: list[Tensor]) -> str:
    """How logits and greedy tokens differ, or nothing."""
    scale = max(float(w.abs().max()) for w in wanted) or 1.0
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        apart = (a - b).abs().amax(-1) / scale
        bad = ~(apart <= TOLERANCE)
        if bad.any():
            row = int(bad.nonzero()[0])
            return f"sequence {number}, row {row}: logits differ by {float(apart[row]):.2e}"
        behind = b.amax(-1) - b.gather(-1, a.argmax(-1, keepdim=True))[:, 0]
        if bool((behind > TIE * scale).any()):
            return f"sequence {number}: other greedy tokens"
    return ""
