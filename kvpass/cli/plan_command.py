"""The command ``kvpass plan``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvpass.cli.terminal import line, output
from kvpass.config import CACHE_DTYPES
from kvpass.errors import InputError


def plan(
    memory: Annotated[str, typer.Option(help="Memory of the cache, such as 80GiB.")],
    context: Annotated[int, typer.Option(min=1, help="Cached tokens of a sequence, prompt and output together.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="As for inspect; or give --layers and so on.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Attentions of a model that is not at hand.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Heads of keys and values in each.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Width of a head.")] = None,
    query_heads: Annotated[int | None, typer.Option(min=1, help="Query heads; else as many as KV heads.")] = None,
    value_dim: Annotated[int | None, typer.Option(min=1, help="Width of a value head, if it is another.")] = None,
    number_bytes: Annotated[int, typer.Option("--bytes", help="Bytes of a number in the model: 4, 2 or 1.")] = 2,
    window: Annotated[int | None, typer.Option(min=1, help="Newest tokens that window layers look at.")] = None,
    window_layers: Annotated[int | None, typer.Option(min=1, help="How many layers have the window; else all.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Format of keys and values: {', '.join(CACHE_DTYPES)}.")] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens per block, a power of two.")] = 32,
    shared_prefix: Annotated[int, typer.Option(min=0, help="Tokens that all sequences begin with.")] = 0,
    requests: Annotated[int | None, typer.Option(min=1, help="Sequences that are wanted at once.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Work out how much memory a cache takes, how many sequences fit, and what each technique saves."""
    from kvpass.config import CacheConfig
    from kvpass.loading import load_model
    from kvpass.planner import Demand, Shape, plan_data, plan_lines, plan_model, plan_shape, plan_table

    config = CacheConfig(dtype=dtype, block_size=block_size, memory=memory)
    demand = Demand(context, shared_prefix, requests)
    numbers = (layers, kv_heads, head_dim)
    if (model is None) == all(number is None for number in numbers):
        raise InputError("say which model: --model, or --layers, --kv-heads and --head-dim")
    if model is not None:
        found = plan_model(load_model(model).model, config, demand)
    else:
        if layers is None or kv_heads is None or head_dim is None:
            raise InputError("a model by numbers needs all of --layers, --kv-heads and --head-dim")
        shape = Shape(layers, kv_heads, head_dim, query_heads, value_dim, window, window_layers)
        found = plan_shape(shape, number_bytes, config, demand)
    if as_json:
        typer.echo(json.dumps(plan_data(found), indent=2))
        return
    output().print(plan_table(found))
    for row in plan_lines(found):
        line(output(), row)
