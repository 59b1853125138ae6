"""Right, refused, wrong or crash: what kvpass makes of an attack."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kvpass
from tests.adversarial.parts import BASE, Attack
from tests.parity.paged_logits import paged_logits

BLOCK = 16
TIE = 1e-3
REAL = 1e-2  # an attack moves the logits by more than this, relative to the largest
GENERATED_TWICE = 1500  # beyond this length one new token is asked for, not two


@dataclass(frozen=True)
class Verdict:
    """What became of one attack.

    Attributes:
        outcome: "right", "refused", "wrong" or "crash".
        detail: the reason of the refusal, or what is wrong.
    """

    outcome: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.outcome}: {self.detail}" if self.detail else self.outcome


def apart(got: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest entry; where one is no number the other must be none."""
    got, wanted = got.float(), wanted.float()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    scale = float(wanted[wanted.isfinite()].abs().max()) if bool(wanted.isfinite().any()) else 1.0
    off = torch.where(same, 0.0, (got - wanted).abs() / (scale or 1.0))
    return float(torch.where(off.isnan(), torch.inf, off).max())


@torch.no_grad()
def last_row(attack: Attack, model: nn.Module, tokens: list[int], misread: bool = False) -> Tensor:
    """The truth: logits `[V]` of the last token, by the model itself on just these tokens."""
    take = attack.misread if misread and attack.misread is not None else attack.logits
    logits = take(model(torch.tensor([tokens])))
    return logits.reshape(-1, logits.shape[-1] if logits.dim() else 1)[-1]


def unreal(attack: Attack) -> list[int]:
    """Lengths at which the attack changes nothing, and so would prove nothing."""
    model = attack.build()
    before = [last_row(attack, model, attack.text(n)) for n in attack.lengths]
    if attack.change is not None:
        attack.change(model)
        after = [last_row(attack, model, attack.text(n)) for n in attack.lengths]
    else:
        other = attack.build() if attack.benign is None else attack.benign()
        after = [last_row(attack, other, attack.text(n), misread=True) for n in attack.lengths]
    same = [a.shape == b.shape and apart(b, a) < REAL for a, b in zip(before, after, strict=True)]
    return [n for n, unmoved in zip(attack.lengths, same, strict=True) if unmoved]


def judge(attack: Attack) -> Verdict:
    """Compile the model, and compare the engine with it at every length, before and after its change."""
    model = attack.build()
    lengths = sorted({*BASE, *attack.lengths})
    config = kvpass.CacheConfig(
        **{"block_size": BLOCK, "num_blocks": 2 * -(-(lengths[-1] + 8) // BLOCK) + 8, **dict(attack.config)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            engine = kvpass.compile(model, config)
        except kvpass.KvpassError as error:
            return _refused(error)
        except Exception as error:
            return Verdict("crash", f"compile: {type(error).__name__}: {error}"[:300])
        found = _compare(attack, model, engine, lengths)
        if attack.change is None or found.outcome != "right":
            return found
        attack.change(model)
        after = _compare(attack, model, engine, lengths)
        return Verdict(after.outcome, f"after the change: {after.detail}")


def _refused(error: kvpass.KvpassError) -> Verdict:
    if not isinstance(error, kvpass.RefusedError):
        return Verdict("refused", f"{type(error).__name__}: {error}"[:300])
    report, what = error.report, type(error).__name__
    if report.verification is not None:
        failed = [check for check in report.verification.checks if check.startswith("FAILED")]
        return Verdict("refused", f"{what}: {(failed or ['?'])[0]}"[:300])
    text = "; ".join(f"{r.pass_name}: {r.reason}" for r in report.refusals) or "no refusal at all"
    broken = not report.refusals or any("defect of kvpass" in r.reason for r in report.refusals)
    return Verdict("crash" if broken else "refused", text.splitlines()[0][:300])


def _compare(attack: Attack, model: nn.Module, engine: kvpass.Engine, lengths: list[int]) -> Verdict:
    wanted = {n: last_row(attack, model, attack.text(n)) for n in lengths}
    refused: dict[int, str] = {}
    for n in lengths:
        try:
            detail = _generated(attack, model, engine, n, wanted[n])
        except kvpass.KvpassError as error:
            refused[n] = f"{type(error).__name__}: {error}"[:200]
        except Exception as error:
            return Verdict("crash", f"generate at {n}: {type(error).__name__}: {error}"[:300])
        else:
            if detail:
                return Verdict("wrong", detail)
    limit = engine.plan.max_length
    rows = [n for n in lengths if limit is None or n <= limit]
    guarded = [n for n in rows if n in refused]
    note = "; ".join(f"at {n}: {reason}" for n, reason in refused.items())
    try:
        detail = _rows(attack, engine, rows, wanted)
    except kvpass.KvpassError as error:
        return Verdict("refused", note or f"step: {error}"[:200])
    except Exception as error:
        return Verdict("crash", f"step: {type(error).__name__}: {error}"[:300])
    if detail and len(guarded) == len(rows):
        return Verdict("wrong", f"generate raises, engine.module does not ({detail})")
    if detail:
        return Verdict("wrong", detail)
    return Verdict("refused", note) if refused else Verdict("right")


def _generated(attack: Attack, model: nn.Module, engine: kvpass.Engine, n: int, wanted: Tensor) -> str:
    """What is wrong with the greedy continuation of the first `n` tokens and its probabilities, or nothing."""
    tokens = list(attack.text(n))
    sampling = kvpass.Sampling(ignore_eos=True, logprobs=len(wanted))
    handle = engine.submit(tokens, 2 if n < GENERATED_TWICE else 1, sampling)
    for step, token in enumerate(handle.result()):
        row = (wanted if step == 0 else last_row(attack, model, tokens)).float()
        if token >= len(row) or float(row.max() - row[token]) > max(TIE, attack.tolerance) * float(row.abs().max()):
            return f"other greedy token at length {len(tokens)}"
        top = dict(handle.logprobs[step].top)
        found = torch.tensor([top.get(i, torch.nan) for i in range(len(row))])
        if not apart(found, row.log_softmax(-1)) <= attack.tolerance:
            return f"other probabilities at length {len(tokens)} ({apart(found, row.log_softmax(-1)):.1e})"
        tokens.append(token)
    return ""


def _rows(attack: Attack, engine: kvpass.Engine, lengths: list[int], wanted: dict[int, Tensor]) -> str:
    """What is wrong with the logits of the longest text in three steps, at each length, or nothing."""
    if not lengths:
        return ""
    tokens = attack.text(lengths[-1])
    first = max(1, 2 * len(tokens) // 3, engine.plan.prefix)
    rest = max(0, len(tokens) - first - 1)
    cuts = [cut for cut in (first, rest, len(tokens) - first - rest) if cut]
    (rows,) = paged_logits(engine, [tokens], [(cut,) for cut in cuts])
    off = {n: apart(rows[n - 1], wanted[n]) if len(rows[n - 1]) == len(wanted[n]) else torch.inf for n in lengths}
    bad = [n for n, distance in off.items() if not distance <= attack.tolerance]
    return f"logits at length {bad[0]} differ by {off[bad[0]]:.1e}" if bad else ""
