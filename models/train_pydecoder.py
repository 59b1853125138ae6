"""Train `pydecoder` from nothing: corpus, tokenizer, model, checkpoint, on two CPU cores in under an hour.

    OMP_WAIT_POLICY=passive python -m kvpass.models.train_pydecoder --out checkpoint --minutes 50

(Passive, because threads that spin while they wait cost more than half the speed where cores are shared.)

The order of the data is seeded. The schedule runs on elapsed time, not on steps, so that the learning rate reaches
zero when the budget ends, however busy the machine is; a second run therefore gives a like model, not the same bits.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from kvpass.models.eval_pydecoder import perplexity
from kvpass.models.pydecoder import END_OF_TEXT, PyDecoder, PyDecoderConfig, load, load_tokenizer, save
from kvpass.models.pydecoder_corpus import build_corpus

CHUNK = 2048  # tokens; the longest window
CHUNKS_PER_BLOCK = 32  # windows are shuffled inside a block, so the window length may change between two blocks
STEP_TOKENS = 4096
REPEATED, SHORTEST_PERIOD = 0.1, 32  # share of windows that repeat themselves; tokens
STAGES = ((0.0, 512), (0.70, 1024), (0.90, 2048))  # from this share of the time on, windows of this length
WARM_UP, HOLD = 0.04, 0.30  # shares of the time: rate rises until, stays until, then falls linearly to zero
MATRIX_RATE, VECTOR_RATE = 4e-3, 3e-3  # Muon with AdamW-like update size; AdamW for embeddings and norms


def train_tokenizer(texts: tuple[str, ...], vocab_size: int) -> Tokenizer:
    """A byte-level BPE over `texts`: no text is out of its vocabulary; `END_OF_TEXT` is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: tuple[str, ...], order: Tensor) -> Tensor:
    """The texts in the given order as one stream of ids, [T] int64, `END_OF_TEXT` behind each."""
    (end,) = tokenizer.encode(END_OF_TEXT).ids
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([texts[i] for i in order.tolist()]):
        ids += [*encoding.ids, end]
    return torch.tensor(ids)


def batches(stream: Tensor, window: Callable[[], int], generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless inputs and targets, each [STEP_TOKENS / S, S] int64, S = `window()`; an epoch sees each chunk once."""
    num_chunks = (len(stream) - 1) // CHUNK
    inputs = stream[: num_chunks * CHUNK].view(num_chunks, CHUNK)
    targets = stream[1 : num_chunks * CHUNK + 1].view(num_chunks, CHUNK)
    while True:
        epoch = torch.randperm(num_chunks, generator=generator)
        for block in torch.split(epoch[: num_chunks - num_chunks % CHUNKS_PER_BLOCK], CHUNKS_PER_BLOCK):
            length = window()
            order = torch.randperm(block.numel() * CHUNK // length, generator=generator)
            x, y = (part[block].view(-1, length)[order] for part in (inputs, targets))
            per_step = STEP_TOKENS // length
            yield from zip(torch.split(x, per_step), torch.split(y, per_step), strict=True)


def rate(progress: float) -> float:
    """Share of the full learning rate when `progress` (0 to 1) of the time is gone."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.01)
    return min(1.0, max(0.0, (1 - progress) / (1 - HOLD)))


def window_length(progress: float) -> int:
    """Window length of the stage that `progress` (0 to 1) falls into."""
    return max(length for start, length in STAGES if start <= progress)


def repeat_some(input_ids: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Let about `REPEATED` of the windows say their own beginning again and again, in place; both are [N, S] int64.

    Copying from far back is learnt late from plain text, and a decoder that cannot do it hides a broken cache.
    """
    length = input_ids.shape[1]
    for row in (torch.rand(len(input_ids), generator=generator) < REPEATED).nonzero().flatten().tolist():
        period = int(torch.randint(SHORTEST_PERIOD, length // 2 + 1, (1,), generator=generator))
        said = input_ids[row, :period].repeat(length // period + 2)
        input_ids[row], targets[row] = said[:length], said[1 : length + 1]
    return input_ids, targets


def initialise(model: PyDecoder) -> None:
    """Normal weights; what writes into the residual stream is smaller, by the number of writers."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            std = 0.02 if name == "embed.weight" else weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * model.config.num_layers)
            torch.nn.init.normal_(weight, std=std)


def optimizers(model: PyDecoder) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "embed.weight"]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or name == "embed.weight"]
    muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    return muon, adam


def train(model: PyDecoder, stream: Tensor, held_out: Tensor, out: Path, minutes: float, seed: int) -> None:
    """Train for `minutes` on `stream` [T] and write the checkpoint to `out` every few minutes and at the end."""
    parts = optimizers(model)
    base_rates = [part.param_groups[0]["lr"] for part in parts]

    def loss_of(input_ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    compiled = torch.compile(loss_of, dynamic=False)
    for _, length in STAGES:  # compiling takes a minute or two: before the clock starts, not inside the warm-up
        ids = torch.zeros(STEP_TOKENS // length, length, dtype=torch.int64)
        torch.autograd.backward(compiled(ids, ids))
    model.zero_grad()
    start = time.monotonic()
    saved = reported = start
    tokens, mean_loss = 0, 0.0

    def progress() -> float:
        return (time.monotonic() - start) / (60 * minutes)

    generator = torch.Generator().manual_seed(seed)
    data = batches(stream, lambda: window_length(progress()), generator)
    for step, plain in enumerate(data):
        input_ids, targets = repeat_some(*plain, generator)
        done = progress()
        if done >= 1:
            break
        loss = compiled(input_ids, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part, base in zip(parts, base_rates, strict=True):
            part.param_groups[0]["lr"] = base * rate(done)
            part.step()
            part.zero_grad()
        tokens += input_ids.numel()
        mean_loss = loss.item() if step == 0 else 0.95 * mean_loss + 0.05 * loss.item()
        now = time.monotonic()
        if now - reported > 20:
            speed = tokens / (now - start)
            shape = f"{input_ids.shape[0]}x{input_ids.shape[1]}"
            print(f"{done:6.1%} step {step} tokens {tokens} {shape} loss {mean_loss:.3f} {speed:.0f}/s", flush=True)
            reported = now
        if now - saved > 240:
            save(model, out)
            print(f"saved; held-out slice {perplexity(model, held_out[: 8 * 1024], 1024):.2f}", flush=True)
            saved = time.monotonic()
    save(model, out)
    print(f"done: {tokens} tokens, {tokens / len(stream):.2f} epochs", flush=True)


def main() -> None:
    """Read the options, build everything, write the checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=50.0, help="wall time of the training loop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data")
    parser.add_argument("--start-from", type=Path, help="checkpoint folder whose tokenizer and weights to go on from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.threads))

    options.out.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus()
    if options.start_from:
        tokenizer, model = load_tokenizer(options.start_from), load(options.start_from)
    else:
        torch.manual_seed(options.seed)
        model = PyDecoder(PyDecoderConfig())
        initialise(model)
        tokenizer = train_tokenizer(corpus.train, model.config.vocab_size)
    tokenizer.save(str(options.out / "tokenizer.json"))
    # In the file the end-of-text token is spelled out, so that encoding the file gives the stream back.
    (options.out / "heldout.txt").write_text(END_OF_TEXT.join(corpus.held_out), encoding="utf-8")
    order = torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(options.seed))
    stream = encode(tokenizer, corpus.train, order)
    held_out = encode(tokenizer, corpus.held_out, torch.arange(len(corpus.held_out)))
    print(f"training files {len(corpus.train)}, tokens {len(stream)}", flush=True)
    print(f"held-out files {len(corpus.held_out)}, tokens {len(held_out)}", flush=True)
    train(model, stream, held_out, options.out, options.minutes, options.seed)


if __name__ == "__main__":
    main()
