"""Associative recall and copying: two made-up tasks that a decoder can only do by reading its cache exactly.

Text hides what a coarse cache breaks, since most of its tokens follow from the few before them. Here nothing does: a
value is as good as any other unless the one key is found, and one lost token of a copied string is lost for good.

    recall   RECALL k v n k v n n ... QUERY k v k v ...     each key once, asked for once, in another order
    copy     n n COPY x x x ... QUERY x x x ...             a random string, said again

`k` are keys and `v` values; noise `n` is drawn from the values in the first task, so that only the place right behind
a key marks its value, and from all symbols in the second. What is scored are the values behind `QUERY` and the string
said again. The model is a `PyDecoder` (its `RECALL_CONFIG` is below); the shipped checkpoint lies in the folder
`recall-checkpoint/` (see its MODEL_CARD.md), `train_recall.py` made it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvpass.models.pydecoder import PyDecoderConfig

CHECKPOINT = Path(__file__).resolve().parent / "recall-checkpoint"
END, RECALL, COPY, QUERY = 0, 1, 2, 3  # token ids; END is never said
FIRST_KEY, FIRST_VALUE, VOCAB_SIZE = 8, 128, 256  # keys 8..127, values 128..255; all of them are symbols
SHORTEST = 16  # tokens
HELD_OUT_SEED, HELD_OUT_GROUP = 1_000_003, 8  # training uses small seeds; sequences with equally many pairs
RECALL_CONFIG = PyDecoderConfig(
    vocab_size=VOCAB_SIZE,
    d_model=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    d_ff=256,
    max_length=512,
)


@dataclass(frozen=True)
class TaskBatch:
    """Sequences of one task and one length.

    Attributes:
        input_ids: tokens, [N, S] int64.
        scored: bool [N, S]; a token that is an answer, to be predicted from the tokens before it.
    """

    input_ids: Tensor
    scored: Tensor


def recall_batch(rows: int, length: int, generator: torch.Generator) -> TaskBatch:
    """`rows` sequences of associative recall, each of `length` tokens.

    All have the same number of pairs, drawn between an eighth and a quarter of the length; noise fills the rest.
    """
    _check(length)
    most = min((length - 2) // 4, FIRST_VALUE - FIRST_KEY)
    pairs = _between(min(length // 8, most), most, generator)
    noise = length - 2 - 4 * pairs
    keys = _permutations(rows, FIRST_VALUE - FIRST_KEY, generator)[:, :pairs] + FIRST_KEY
    values = torch.randint(FIRST_VALUE, VOCAB_SIZE, (rows, pairs), generator=generator)
    ids = torch.randint(FIRST_VALUE, VOCAB_SIZE, (rows, length), generator=generator)  # what nobody writes is noise
    ids[:, 0] = RECALL
    # Pairs and single noise tokens in random order: a pair takes two places, and so moves all that follow.
    is_pair = _permutations(rows, pairs + noise, generator) < pairs
    starts = (is_pair.long() + 1).cumsum(1) - (is_pair.long() + 1) + 1
    places = starts[is_pair].view(rows, pairs)
    ids.scatter_(1, places, keys)
    ids.scatter_(1, places + 1, values)
    asked = _permutations(rows, pairs, generator)
    query = length - 2 * pairs - 1
    ids[:, query] = QUERY
    ids[:, query + 1 :: 2] = keys.gather(1, asked)
    ids[:, query + 2 :: 2] = values.gather(1, asked)
    scored = torch.zeros(rows, length, dtype=torch.bool)
    scored[:, query + 2 :: 2] = True
    return TaskBatch(ids, scored)


def copy_batch(rows: int, length: int, generator: torch.Generator) -> TaskBatch:
    """`rows` sequences of copying, each of `length` tokens; the string is a quarter to half of that, behind noise."""
    _check(length)
    most = (length - 2) // 2
    count = _between(length // 4, most, generator)
    ids = torch.randint(FIRST_KEY, VOCAB_SIZE, (rows, length), generator=generator)
    query = length - count - 1
    ids[:, query] = QUERY
    ids[:, query - count - 1] = COPY
    ids[:, query + 1 :] = ids[:, query - count : query]
    scored = torch.zeros(rows, length, dtype=torch.bool)
    scored[:, query + 1 :] = True
    return TaskBatch(ids, scored)


TASKS = {"recall": recall_batch, "copy": copy_batch}


def held_out(task: str, rows: int, length: int) -> TaskBatch:
    """Sequences of a task that no training run has drawn, in groups of different sizes; the same ones at each call."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED + length)
    sizes = [min(HELD_OUT_GROUP, rows - first) for first in range(0, rows, HELD_OUT_GROUP)]
    groups = [TASKS[task](size, length, generator) for size in sizes]
    return TaskBatch(torch.cat([group.input_ids for group in groups]), torch.cat([group.scored for group in groups]))


def accuracy(logits: Tensor, batch: TaskBatch) -> float:
    """Share of answers that are the likeliest token: logits [N, S, V], those at each position for the next token."""
    right = logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]
    return right[batch.scored[:, 1:]].double().mean().item()


def _check(length: int) -> None:
    if length < SHORTEST:
        raise ValueError(f"length={length} is too short: at least {SHORTEST} tokens")


def _between(lowest: int, highest: int, generator: torch.Generator) -> int:
    return int(torch.randint(lowest, highest + 1, (1,), generator=generator))


def _permutations(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """[rows, size] int64: in each row the numbers below `size` in random order."""
    return torch.rand(rows, size, generator=generator).argsort(1)
