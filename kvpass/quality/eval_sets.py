"""What cache formats are measured on: text that comes with a model or is given, and tasks of recall and copying."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.loading import SHIPPED_RECALL, SHIPPED_TEXT, LoadedModel, encode_prompts
from kvpass.models import pydecoder, recall
from kvpass.quality.replay import Samples

TEXT = "text"


@dataclass(frozen=True)
class EvalSizes:
    """How much is measured.

    Attributes:
        text_tokens: tokens of text, in windows.
        window: tokens of a window; every token sees those of its window alone.
        prompts: prompts that are continued freely.
        prompt_tokens: tokens of each of them.
        new_tokens: tokens that are added to each of them.
        task_rows: sequences of each task.
        task_length: tokens of such a sequence.
    """

    text_tokens: int = 16384
    window: int = 1024
    prompts: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 384
    task_rows: int = 64
    task_length: int = 512


@dataclass(frozen=True)
class EvalSets:
    """What one model is measured on.

    Attributes:
        samples: known sequences.
        prompts: int64 ``[N, S]``, beginnings to be continued; None where that says nothing.
    """

    samples: tuple[Samples, ...]
    prompts: Tensor | None = None


def eval_sets(loaded: LoadedModel, text: Path | None, sizes: EvalSizes) -> EvalSets:
    """What to measure a model on: the text given, or what belongs to a shipped model.

    Raises:
        InputError: if there is no text, or too little.
    """
    if text is not None:
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the text {text} cannot be read: {error}") from error
        return text_sets(torch.tensor(encode_prompts(loaded, [content])[0]), sizes)
    if loaded.name == SHIPPED_RECALL:
        return EvalSets(recall_samples(sizes.task_rows, sizes.task_length))
    if loaded.name == SHIPPED_TEXT:
        held_out = (pydecoder.CHECKPOINT / "heldout.txt").read_text(encoding="utf-8")
        return text_sets(torch.tensor(encode_prompts(loaded, [held_out])[0]), sizes)
    raise InputError(f"{loaded.name} comes with no text to measure it on: give --text FILE")


def text_sets(ids: Tensor, sizes: EvalSizes) -> EvalSets:
    """Windows and prompts of a text, int64 ``[T]``, evenly spread over it.

    Raises:
        InputError: if it has fewer tokens than a prompt.
    """
    if len(ids) <= sizes.prompt_tokens:
        raise InputError(f"the text has {len(ids)} tokens: give one of more than {sizes.prompt_tokens}")
    window = min(sizes.window, len(ids))
    windows = spread(ids, window, max(1, min(sizes.text_tokens, len(ids)) // window))
    scored = torch.ones_like(windows, dtype=torch.bool)
    scored[:, 0] = False
    return EvalSets((Samples(TEXT, windows, scored),), spread(ids, sizes.prompt_tokens, sizes.prompts))


def spread(ids: Tensor, length: int, count: int) -> Tensor:
    """``count`` pieces of ``length`` tokens, from the beginning to the end: ``[count, length]``."""
    starts = torch.linspace(0, len(ids) - length, count).long()
    return ids[starts[:, None] + torch.arange(length)]


def recall_samples(rows: int, length: int) -> tuple[Samples, ...]:
    """Held-out sequences of every task of the recall model; the answers are scored."""
    batches = {task: recall.held_out(task, rows, length) for task in recall.TASKS}
    return tuple(Samples(task, batch.input_ids, batch.scored) for task, batch in batches.items())


def is_task(name: str) -> bool:
    """Whether samples of this name are a task, whose figure is accuracy, or else text, whose figure is perplexity."""
    return name in recall.TASKS
