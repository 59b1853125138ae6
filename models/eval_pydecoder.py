"""Held-out perplexity of `pydecoder`, and what it becomes when the model may not look back far.

    python -m kvpass.models.eval_pydecoder            # prints, compares nothing, writes nothing
    python -m kvpass.models.eval_pydecoder --write    # writes metrics.json into the checkpoint folder

The checkpoint is read as float32 (it is stored in bfloat16); windows do not overlap.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpass.models.pydecoder import CHECKPOINT, load, load_tokenizer

WINDOW = 1024  # tokens
SLICE_WINDOWS = 8  # what the tests measure again
REREAD, REREAD_TOKENS = 256, 16 * 1024  # tokens of a passage that is read twice, and of all passages
BATCH_TOKENS = 8192


def _losses(model: nn.Module, windows: Tensor, scored: int) -> Tensor:
    """Loss in nats of the last `scored` targets of each window [N, S + 1]; result [N, scored] float32."""
    length = windows.shape[1] - 1
    losses = []
    with torch.no_grad():
        for part in torch.split(windows, max(1, BATCH_TOKENS // length)):
            logits = model(part[:, :-1])[:, -scored:].float()
            targets = part[:, -scored:]
            losses.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    return torch.cat(losses)


def perplexity(model: nn.Module, ids: Tensor, window: int) -> float:
    """Perplexity per token of ids [T] int64, cut into windows of `window` inputs; every next token is scored."""
    if len(ids) <= window:
        raise ValueError(f"{len(ids)} tokens hold no window of {window} inputs and their targets")
    return math.exp(_losses(model, ids.unfold(0, window + 1, window), window).mean().item())


def perplexity_of_context(model: nn.Module, ids: Tensor, context: int) -> float:
    """Perplexity per token of ids [T] int64 when each scored token sees exactly `context` tokens.

    One token in `context` is scored, so the cost does not grow with it.
    """
    return math.exp(_losses(model, ids.unfold(0, context + 1, context), 1).mean().item())


def perplexity_of_rereading(model: nn.Module, ids: Tensor, length: int, shuffled: bool = False) -> float:
    """Perplexity per token of passages of `length` tokens, ids [T] int64, that stand in the context once already.

    `shuffled` puts the first reading, and it alone, into random order: the same tokens are there, nothing to copy is.
    """
    passages = ids[: len(ids) - len(ids) % length].view(-1, length)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(length)
    twice = torch.cat((passages[:, order], passages), dim=1)
    return math.exp(_losses(model, twice, length - 1).mean().item())


def read_held_out(directory: Path) -> tuple[Tensor, float]:
    """The held-out text of a checkpoint folder as ids [T] int64, and its length in bytes per token."""
    text = (directory / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer(directory).encode(text).ids)
    return ids, len(text.encode()) / len(ids)


def measure(directory: Path) -> dict[str, float]:
    """All figures of the model card, from the checkpoint in `directory` loaded as float32."""
    model = load(directory)
    ids, bytes_per_token = read_held_out(directory)
    whole = perplexity(model, ids, WINDOW)
    return {
        "held_out_tokens": len(ids),
        "bytes_per_token": round(bytes_per_token, 4),
        "perplexity": round(whole, 4),
        "bits_per_byte": round(math.log2(whole) / bytes_per_token, 4),
        "perplexity_window_2048": round(perplexity(model, ids, 2048), 4),
        "perplexity_context_1": round(perplexity_of_context(model, ids, 1), 4),
        "perplexity_context_16": round(perplexity_of_context(model, ids, 16), 4),
        "perplexity_rereading": round(perplexity_of_rereading(model, ids[:REREAD_TOKENS], REREAD), 4),
        "perplexity_rereading_shuffled": round(perplexity_of_rereading(model, ids[:REREAD_TOKENS], REREAD, True), 4),
        "slice_tokens": SLICE_WINDOWS * WINDOW,
        "slice_perplexity": round(perplexity(model, ids[: SLICE_WINDOWS * WINDOW + 1], WINDOW), 4),
    }


def main() -> None:
    """Print the figures; with `--write`, also put them into metrics.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write metrics.json into the checkpoint folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = json.dumps(measure(options.checkpoint), indent=2) + "\n"
    print(text, end="")
    if options.write:
        (options.checkpoint / "metrics.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
