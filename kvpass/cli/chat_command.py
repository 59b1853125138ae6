"""``kvpass chat``: a conversation with a model in a terminal."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any

import typer
from rich.text import Text

from kvpass.cli.terminal import line, output

PROMPT = "> "


def chat(
    model: Annotated[str, typer.Option("--model", "-m", metavar="FOLDER", help="The folder of a transformers model.")],
    system: Annotated[str, typer.Option(help="A first message that says how the model is to answer.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens of an answer.")
    ] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the most likely token.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest tokens with this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the choice reproducible.")] = None,
    dtype: Annotated[str, typer.Option(help="Format of keys and values.")] = "auto",
    memory: Annotated[str, typer.Option(help="Memory of the cache, such as 512MiB.")] = "256MiB",
) -> None:
    """Talk with a model; an empty line or the end of the input ends it."""
    from kvpass import CacheConfig, load

    engine = load(model, CacheConfig(dtype=dtype, memory=memory))
    given = {"temperature": temperature, "top_p": top_p, "seed": seed}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    messages = [{"role": "system", "content": system}] if system else []
    console = output()
    while said := _next_line():
        messages.append({"role": "user", "content": said})
        answer = ""
        with closing(engine.stream_chat(messages, max_new_tokens, **options)) as pieces:
            for piece in pieces:
                console.print(Text(piece), end="", soft_wrap=True)
                answer += piece
        line(console, "")
        messages.append({"role": "assistant", "content": answer})


def _next_line() -> str:
    try:
        return input(PROMPT)
    except EOFError:
        return ""
