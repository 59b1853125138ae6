"""``kvpass demo``: the shipped model without a cache, rewritten, put to work, and measured beside two others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from kvpass.cli.terminal import heading, line, mebibytes, progress_bar, stage
from kvpass.cli.text_stream import TextStream, TextsView, label_of
from kvpass.compiler import compile
from kvpass.config import CacheConfig
from kvpass.engine.engine import Engine
from kvpass.models.pydecoder import CHECKPOINT, PyDecoder, load, load_tokenizer
from kvpass.quality.contiguous_peer import ContiguousDecoder
from kvpass.quality.measure import (
    Contender,
    EngineDecoder,
    Timing,
    UncachedDecoder,
    count_agreeing,
    describe_machine,
    time_side_by_side,
)
from kvpass.runtime.schedule.stats import EngineStats
from kvpass.types import Sampling

# A module of the held-out text, of which about 1000 tokens stand before the line at which the prompts part.
OPENING = '"""A generally useful event scheduler class.'
PARTING = "    def empty(self):"
STUBS = (
    "    def empty(self):",
    "    def run(self, blocking=True):",
    "    def __len__(self):",
    "    def get(self, time, priority=0):",
)
MEMORY = "16MiB"
IN_VIEW = Sampling(temperature=0.7, top_p=0.9, ignore_eos=True)  # measurements are greedy; to read, that is too dull

PAGED, CONTIGUOUS, UNCACHED = "kvpass", "contiguous cache, written by hand", "no cache"


@dataclass(frozen=True)
class DemoSizes:
    """How much the demo does.

    Attributes:
        new_tokens: new tokens of each prompt, in view.
        turns: how often each decoder is timed.
        steps: steps of such a turn.
        uncached_steps: the same without a cache, where each computes all tokens again.
        seconds: time after which no further turns begin.
    """

    new_tokens: int = 96
    turns: int = 12
    steps: int = 8
    uncached_steps: int = 1
    seconds: float = 15.0


@dataclass(frozen=True)
class DemoFigures:
    """What the demo found out.

    Attributes:
        timings: of each decoder.
        stats: of the engine after streaming, before measuring.
        blocks_shared: most blocks that several sequences used at once.
        blocks_used: blocks used at that time.
        contiguous_bytes: what the contiguous cache reserves for the same sequences.
    """

    timings: dict[str, Timing]
    stats: EngineStats
    blocks_shared: int
    blocks_used: int
    contiguous_bytes: int

    def times_faster_than(self, name: str) -> float:
        """Tokens per second of kvpass over those of the decoder called ``name``."""
        return self.timings[PAGED].tokens_per_second / self.timings[name].tokens_per_second


def run_shipped(console: Console) -> DemoFigures:
    """Load the shipped model and run the demo on it."""
    with stage(console, "load the model"):
        model, tokenizer = load(), load_tokenizer()
        prompts = demo_prompts((CHECKPOINT / "heldout.txt").read_text(encoding="utf-8"))
    return run(console, model, tokenizer, prompts)


def demo_prompts(held_out: str) -> list[str]:
    """Prompts with one long beginning, of text that the model was not trained on, and an end of their own each."""
    start = held_out.index(OPENING)
    beginning = held_out[start : held_out.index(PARTING, start)]
    return [beginning + stub for stub in STUBS]


def run(
    console: Console, model: PyDecoder, tokenizer: Tokenizer, prompts: Sequence[str], sizes: DemoSizes | None = None
) -> DemoFigures:
    """Rewrite ``model``, continue ``prompts`` in view, measure, and print what was found."""
    sizes = sizes or DemoSizes()
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    with stage(console, "rewrite it and verify the rewrite"):
        engine = compile(model, CacheConfig(memory=MEMORY))
    console.print(engine.report)
    heading(console, f"{len(ids)} prompts of {min(map(len, ids))} to {max(map(len, ids))} tokens, continued at once")
    stats, shared, used = stream(console, engine, tokenizer, prompts, ids, sizes.new_tokens)
    timed_tokens = 1 + sizes.turns * sizes.steps
    peer = ContiguousDecoder(model, len(ids), max(map(len, ids)) + timed_tokens)
    contenders = (
        Contender(PAGED, EngineDecoder(engine, timed_tokens), sizes.steps),
        Contender(CONTIGUOUS, peer, sizes.steps),
        Contender(UNCACHED, UncachedDecoder(model), sizes.uncached_steps),
    )
    with progress_bar(console, "measure side by side", (sizes.turns + 1) * len(contenders)) as advance:
        timings = time_side_by_side(contenders, ids, sizes.turns, sizes.seconds, advance)
    figures = DemoFigures(timings, stats, shared, used, peer.reserved_bytes)
    show_figures(console, figures, engine)
    return figures


def stream(
    console: Console,
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    new_tokens: int,
) -> tuple[EngineStats, int, int]:
    """Continue all prompts in view; the engine's figures, the most blocks shared at once, and those used just then."""
    texts = [TextStream(prompt, tokenizer) for prompt in ids]
    shared = used = 0
    sampling = [replace(IN_VIEW, seed=index) for index in range(len(ids))]
    with TextsView(console, [label_of(number, prompt) for number, prompt in enumerate(prompts, 1)]) as view:
        for index, token in engine.stream([list(prompt) for prompt in ids], new_tokens, sampling):
            view.add(index, texts[index].add(token))
            now = engine.stats()
            if now.blocks_shared >= shared:
                shared, used = now.blocks_shared, max(used, now.blocks_used)
        for index, text in enumerate(texts):
            view.add(index, text.finish())
    return engine.stats(), shared, used


def show_figures(console: Console, figures: DemoFigures, engine: Engine) -> None:
    """Print speed, memory, and what proves that the tokens are right."""
    machine = describe_machine()
    heading(console, f"speed on {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}")
    table = Table()
    table.add_column("decoder")
    for name in ("tokens/s", "ms per step", "threads", "s to first tokens", "kvpass is"):
        table.add_column(name, justify="right")
    for name, timing in figures.timings.items():
        table.add_row(
            name,
            f"{timing.tokens_per_second:.1f}",
            f"{1000 * timing.seconds_per_step:.2f}",
            f"{timing.threads}",
            f"{timing.start_seconds:.2f}",
            "" if name == PAGED else f"{figures.times_faster_than(name):.2f}x as fast",
        )
    console.print(table)
    heading(console, "memory of the cache")
    stats = figures.stats
    for text in (
        f"reserved {mebibytes(stats.bytes_reserved)}, used at most {mebibytes(stats.bytes_peak_used)}; "
        f"one contiguous tensor per sequence would use {mebibytes(figures.contiguous_bytes)}",
        f"waste: {stats.waste:.1%} of the slots in used blocks held no token",
        f"blocks shared: {figures.blocks_shared} of {figures.blocks_used}; {stats.prefix_hit_tokens} tokens of prompts "
        f"were found there, {stats.prefill_tokens} were computed",
    ):
        line(console, text)
    heading(console, "proof")
    verification = engine.report.verification
    if verification is not None:
        word = "passed" if verification.passed else "FAILED"
        line(
            console,
            f"verification {word}: logits within {verification.logits_error:.1e} of the original model's "
            f"(bound {verification.tolerance:.0e})",
            style="green" if verification.passed else "bold red",
        )
    ours = figures.timings[PAGED].tokens
    for name in (CONTIGUOUS, UNCACHED):
        agreeing, compared = count_agreeing(ours, figures.timings[name].tokens)
        line(console, f"same greedy tokens as {name}: {agreeing} of {compared}")
