"""What each cache format costs in quality, on the models that come with kvpass.

Perplexity, divergence and agreement over text, over text that the model writes itself, and the share of right answers
in recall and copying; beside them what a token takes. The last row is what ``kvpass tune`` chooses for a budget. The
tables of docs/quality.md are written from what is found.

    python benchmarks/quality.py
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kvpass.cli.terminal import line, output
from kvpass.loading import SHIPPED, load_model
from kvpass.quality.eval_sets import EvalSizes, eval_sets
from kvpass.quality.evaluate import evaluate
from kvpass.quality.measure import describe_machine, write_result
from kvpass.quality.tables import markdown_table, quality_data, quality_table, tuning_data
from kvpass.quality.tune import parse_budget, tune

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- begin: written by benchmarks/quality.py -->", "<!-- end: written by benchmarks/quality.py -->"
WIDE_ENDS = {"default": "int4", "layers": {0: "bfloat16", -1: "bfloat16"}}
FORMATS: dict[str, Any] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
    "int8": "int8",
    "int4": "int4",
    "k4v2": "k4v2",
    "K int8, V int4": {"key": "int8", "value": "int4"},
    "K int4, V int8": {"key": "int4", "value": "int8"},
    "int4, first and last layer bfloat16": WIDE_ENDS,
}
TUNED_FORMATS = ("bfloat16", "int8", "int4")


def page(text: str, tables: str) -> str:
    """A page with what stands between the two marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"the page has no marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SHIPPED, default=list(SHIPPED))
    parser.add_argument("--budget", default="6bits", help="of the row that is tuned; empty for none")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of text")
    parser.add_argument("--rows", type=int, default=64, help="sequences of each task")
    parser.add_argument("--new-tokens", type=int, default=192, help="tokens that prompts are continued by")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quality.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = EvalSizes(text_tokens=options.tokens, task_rows=options.rows, new_tokens=options.new_tokens)
    few = EvalSizes(
        text_tokens=max(512, options.tokens // 4), window=512, task_rows=max(2, options.rows // 4), task_length=384
    )
    for name in options.models:
        loaded = load_model(name)
        formats, tuning = dict(FORMATS), None
        if options.budget:
            # Tuned on little, and on other sequences of the tasks than those that are measured; text may overlap.
            samples = eval_sets(loaded, None, few).samples
            tuning = tune(loaded.model, samples, TUNED_FORMATS, parse_budget(options.budget), stage=say)
            formats[f"tuned for {options.budget}"] = tuning.dtype
        sets = eval_sets(loaded, None, sizes)
        rows = evaluate(loaded.model, formats, sets.samples, sets.prompts, sizes.new_tokens, stage=say)
        output().print(quality_table(name, rows))
        table = f"{described(sizes)}\n\n{markdown_table(rows)}"
        found = {**quality_data(name, rows), "sizes": asdict(sizes), "table": table}
        if tuning is not None:
            found["tuned"] = tuning_data(name, tuning)
            found["table"] += f"\n\nTuned for {options.budget}: `dtype={tuning.dtype!r}`."
        results = [found if found["model"] == each else measured(options.results, each) for each in SHIPPED]
        write_result(options.results, "quality", {"budget": options.budget}, [each for each in results if each])
        tables = "\n\n".join(f"### {each['model']}\n\n{each['table']}" for each in results if each)
        options.page.write_text(page(options.page.read_text(encoding="utf-8"), tables), "utf-8")
    line(output(), f"written to {options.results} and {options.page}")


def measured(folder: Path, model: str) -> dict[str, Any] | None:
    """What an earlier run found for a model."""
    path = folder / "quality.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else []
    return next((result for result in earlier if result["model"] == model), None)


def described(sizes: EvalSizes) -> str:
    """Where, when and on how much, for a page."""
    machine = describe_machine()
    return (
        f"{machine['processor']}, Python {machine['python']}, torch {machine['torch']}, "
        f"{datetime.now(UTC).date().isoformat()}. Text: {sizes.text_tokens} tokens in windows of {sizes.window}, and "
        f"{sizes.prompts} prompts continued by {sizes.new_tokens}; tasks: {sizes.task_rows} sequences of "
        f"{sizes.task_length} tokens each."
    )


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
