"""The command ``kvpass trace``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpass.cli.terminal import line, output, stages
from kvpass.config import CACHE_DTYPES
from kvpass.errors import ConfigError, InputError

if TYPE_CHECKING:
    from kvpass.trace.replay import Replay


def trace(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Requests, one JSON object a line; see docs/trace.md.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="As for inspect; without it, it is simulated.")
    ] = None,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks of the pool.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of the cache of a real model, such as 1GiB.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per block, a power of two.")] = 32,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens computed in one step.")] = 2048,
    max_sequences: Annotated[int, typer.Option(help="Sequences that run at once.")] = 256,
    sharing: Annotated[bool, typer.Option(help="Reuse blocks of equal prefixes.")] = True,
    dtype: Annotated[str, typer.Option(help=f"Format of keys and values: {', '.join(CACHE_DTYPES)}.")] = "auto",
    step_ms: Annotated[float, typer.Option(min=0, help="What a step of a simulated model costs.")] = 10.0,
    token_us: Annotated[float, typer.Option(min=0, help="What each token in it costs, in microseconds.")] = 50.0,
    speed: Annotated[float, typer.Option(help="How many times faster requests arrive.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="How many requests of the file to replay.")] = None,
    hashed_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one of hash_ids stands for.")] = 512,
    picture: Annotated[Path | None, typer.Option(help="Where to draw occupancy, hit rate, queue: .png, .svg")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write all figures as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Replay a request trace against the scheduler, with a simulated model or a real one."""
    from kvpass import CacheConfig, compile
    from kvpass.loading import load_model
    from kvpass.trace.picture import check_picture, draw_replay
    from kvpass.trace.replay import replay_trace, simulated_engine
    from kvpass.trace.requests import read_trace

    if not 0 < speed < float("inf"):
        raise ConfigError(f"speed={speed} must be a positive number")
    if picture is not None:
        check_picture(picture)
    config = CacheConfig(
        dtype=dtype,
        block_size=block_size,
        prefix_sharing=sharing,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        memory=memory,
        num_blocks=num_blocks,
    )
    requests = read_trace(file, limit, hashed_tokens)
    if model is None:
        if num_blocks is None:
            raise InputError("a simulated model has no bytes: say how large its pool is with --num-blocks")
        engine = simulated_engine(config, step_ms / 1e3, token_us / 1e6)
    else:
        engine = compile(load_model(model).model, config)
    with stages() as stage:
        stage(f"replay {len(requests)} requests")
        found = replay_trace(engine, requests, speed)
    data = {"trace": file.name, "model": model or "simulated", **found.to_dict()}
    if out is not None:
        write_json(out, data)
    if picture is not None:
        draw_replay(found, picture, f"{file.name}: {found.blocks} blocks of {block_size} tokens")
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    for row in replay_lines(found):
        line(output(), row)


def replay_lines(found: Replay) -> list[str]:
    """The figures of a replay in words."""
    times = found.first_token, found.between_tokens
    first, between = (f"p50 {t.p50:.3g} s, p90 {t.p90:.3g} s, p99 {t.p99:.3g} s" for t in times)
    too_large = f", {found.too_large} are too large for the pool" if found.too_large else ""
    return [
        f"{found.finished} of {found.requests} requests finished in {found.seconds:.1f} s of the trace{too_large}",
        f"tokens: {found.input_tokens} in, {found.output_tokens} out; {found.steps} steps",
        f"hit rate: {found.hit_rate:.1%} of the tokens looked up; {found.evictions} blocks evicted",
        f"preemptions: {found.preemptions}; waste: {found.waste:.2%} of the slots in use",
        f"first token: {first}",
        f"between tokens: {between}",
    ]


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write ``data`` to a file.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"the figures {path} cannot be written: {error}") from error
