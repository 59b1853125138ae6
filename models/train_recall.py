"""Train the recall model from nothing: data, curriculum, checkpoint, on one CPU core in half an hour.

    python -m kvpass.models.train_recall --out checkpoint --minutes 30

Attention learns to look things up in one sudden step, and the longer the sequences, the longer it waits before it. So
training begins with 32 tokens, and goes on to twice as many each time that nearly all answers are right. The data is
seeded, but the learning rate follows the clock, so that it reaches zero when the budget ends: a second run gives a
like model, not the same bits.
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.models.eval_recall import measure
from kvpass.models.pydecoder import PyDecoder, load, save
from kvpass.models.recall import RECALL_CONFIG, TASKS, TaskBatch
from kvpass.models.train_pydecoder import initialise, optimizers

LENGTHS = (32, 64, 128, 256, 512)  # tokens; each has to be learnt before the next is tried
STEP_TOKENS = 8192
LEARNT = 0.9  # share of right answers, averaged over some twenty steps
NEWEST = 0.6  # share of steps at the longest length so far; the rest go back to shorter ones
WARM_UP, HOLD, FULL_RATE = 0.03, 0.5, 0.7  # shares of the time, and of the rates in train_pydecoder


def rate(progress: float) -> float:
    """Share of the full learning rate when `progress` (0 to 1) of the time is gone."""
    if progress < WARM_UP:
        return FULL_RATE * max(progress / WARM_UP, 0.01)
    return FULL_RATE * min(1.0, max(0.0, (1 - progress) / (1 - HOLD)))


def mixed_batch(length: int, generator: torch.Generator) -> TaskBatch:
    """STEP_TOKENS tokens in sequences of `length`, half of them of each task."""
    rows = STEP_TOKENS // length // len(TASKS)
    parts = [make(rows, length, generator) for make in TASKS.values()]
    return TaskBatch(torch.cat([part.input_ids for part in parts]), torch.cat([part.scored for part in parts]))


def train(model: PyDecoder, out: Path, minutes: float, seed: int) -> None:
    """Train for `minutes`, and write the checkpoint to `out` every few minutes and at the end."""
    parts = optimizers(model)
    base_rates = [part.param_groups[0]["lr"] for part in parts]

    def loss_of(input_ids: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss in nats and share of right ones over the answers alone."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids)[:, :-1].float()
        targets, counts = input_ids[:, 1:], scored[:, 1:].float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        right = (logits.argmax(-1) == targets).float()
        return (losses * counts).sum() / counts.sum(), (right * counts).sum() / counts.sum()

    compiled = torch.compile(loss_of, dynamic=False)
    generator = torch.Generator().manual_seed(seed)
    for length in LENGTHS:  # compiling takes a minute or two: before the clock starts
        batch = mixed_batch(length, generator)
        torch.autograd.backward(compiled(batch.input_ids, batch.scored)[0])
    model.zero_grad()
    lengths_of = random.Random(seed)
    level, right, mean_loss, tokens, step = 0, 0.0, 0.0, 0, 0
    start = saved = reported = time.monotonic()
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        newest = level == 0 or lengths_of.random() < NEWEST
        length = LENGTHS[level if newest else lengths_of.randrange(level)]
        batch = mixed_batch(length, generator)
        loss, share = compiled(batch.input_ids, batch.scored)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part, base in zip(parts, base_rates, strict=True):
            part.param_groups[0]["lr"] = base * rate(done)
            part.step()
            part.zero_grad()
        tokens, step = tokens + batch.input_ids.numel(), step + 1
        if newest:
            right, mean_loss = 0.95 * right + 0.05 * share.item(), 0.95 * mean_loss + 0.05 * loss.item()
        now = time.monotonic()
        if now - reported > 15:
            speed = tokens / (now - start)
            print(
                f"{done:6.1%} step {step} tokens {tokens} length {LENGTHS[level]} "
                f"loss {mean_loss:.3f} right {right:.4f} {speed:.0f}/s",
                flush=True,
            )
            reported = now
        if now - saved > 180:
            save(model, out)
            print(f"saved; {measure(model)}", flush=True)
            saved = time.monotonic()
        if right > LEARNT and level + 1 < len(LENGTHS):
            level, right = level + 1, 0.0
    save(model, out)
    print(f"done: {tokens} tokens in {step} steps", flush=True)


def main() -> None:
    """Read the options, train, and write the checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=30.0, help="wall time of the training loop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the data")
    parser.add_argument("--start-from", type=Path, help="checkpoint folder whose weights to go on from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.start_from:
        model = load(options.start_from)
    else:
        model = PyDecoder(RECALL_CONFIG)
        initialise(model)
    train(model, options.out, options.minutes, options.seed)
    print(measure(load(options.out)))  # of the weights as they are stored, computed in float32


if __name__ == "__main__":
    main()
