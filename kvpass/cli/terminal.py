"""What a command writes: colour and moving bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from kvpass.progress import silent

WIDTH_IN_A_PIPE = 160


def output() -> Console:
    """Standard output; tables are as wide as the terminal allows, and elsewhere as wide as they want to be."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH_IN_A_PIPE)


def error_line(text: str, style: str = "bold red") -> None:
    """Write ``text`` to standard error as one line."""
    Console(stderr=True, highlight=False).print(Text(" ".join(text.split()), style=style), soft_wrap=True)


def heading(console: Console, text: str) -> None:
    """A line that names what follows."""
    console.print()
    line(console, text, style="bold")


def line(console: Console, text: str, style: str | None = None) -> None:
    """One line, however wide."""
    console.print(Text(text, style=style or ""), soft_wrap=True)


def mebibytes(count: int) -> str:
    """``6553600`` -> ``"6.25 MiB"``."""
    return f"{count / 2**20:.2f} MiB"


@contextmanager
def stage(console: Console, text: str) -> Iterator[None]:
    """Show that something is under way, and print how long it took."""
    began = time.perf_counter()
    if console.is_terminal:
        with console.status(text), silent():
            yield
    else:
        yield
    line(console, f"{text}: {time.perf_counter() - began:.1f} s", style="dim")


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Show on standard error what is under way; gives a function to be called with what begins."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status, silent():
        yield lambda text: status.update(Text(text))


@contextmanager
def progress_bar(console: Console, text: str, total: int) -> Iterator[Callable[[], None]]:
    """Like :func:`stage`, with a bar; gives a function to be called ``total`` times."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(text, total=total)
    began = time.perf_counter()
    with bar:
        yield lambda: bar.advance(task)
    line(console, f"{text}: {time.perf_counter() - began:.1f} s", style="dim")
