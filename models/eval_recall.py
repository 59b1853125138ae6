"""Accuracy of the recall model on held-out sequences, without a cache.

    python -m kvpass.models.eval_recall            # prints
    python -m kvpass.models.eval_recall --write    # writes metrics.json into the checkpoint folder

The checkpoint is read as float32 (it is stored in bfloat16).
"""

import argparse
import json
from pathlib import Path

import torch

from kvpass.models.pydecoder import PyDecoder, load
from kvpass.models.recall import CHECKPOINT, TASKS, accuracy, held_out

LENGTHS, ROWS = (128, 256, 512), 64  # held-out sequences of each task and length
ROWS_AT_ONCE = 8


def measure(model: PyDecoder) -> dict[str, float]:
    """Share of right answers, `<task>_<length>`, in the model's own dtype."""
    figures = {}
    for length in LENGTHS:
        for task in TASKS:
            batch = held_out(task, ROWS, length)
            with torch.no_grad():
                logits = torch.cat([model(part) for part in batch.input_ids.split(ROWS_AT_ONCE)])
            figures[f"{task}_{length}"] = round(accuracy(logits, batch), 6)
    return figures


def main() -> None:
    """Print the figures; with `--write`, also put them into metrics.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write metrics.json into the checkpoint folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = json.dumps(measure(load(options.checkpoint)), indent=2) + "\n"
    print(text, end="")
    if options.write:
        (options.checkpoint / "metrics.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
