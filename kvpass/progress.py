"""What a compile is doing, on the terminal of who waits for it longer than a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock, Timer

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PATIENCE = 1.0  # seconds
# Whether somebody else shows what is under way, such as a command on its own terminal.
_SILENT: ContextVar[bool] = ContextVar("kvpass_silent", default=False)
STAGES = ("capture", "proof", "plan", "rewrite", "verification")


@contextmanager
def silent() -> Iterator[None]:
    """Show nothing in the block."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


@contextmanager
def compile_progress(console: Console | None = None, patience: float = PATIENCE) -> Iterator[Callable[[str], None]]:
    """Show a bar while the block runs, once that has taken a while; where nobody looks, nothing is shown.

    Args:
        console: where to; standard error if None.
        patience: seconds until it is shown.

    Yields:
        a function to be called with the name of each of :data:`STAGES` as it begins.
    """
    console = console or Console(file=sys.stderr)
    if _SILENT.get() or not (console.is_terminal or console.is_jupyter):
        yield lambda stage: None
        return
    columns = (SpinnerColumn(), TextColumn("kvpass: {task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(STAGES[0], total=len(STAGES))
    lock, is_over = Lock(), False

    def show() -> None:
        with lock:
            if not is_over:
                progress.start()

    def begin(stage: str) -> None:
        progress.update(task, description=stage, completed=STAGES.index(stage))

    timer = Timer(patience, show)
    timer.daemon = True
    timer.start()
    try:
        yield begin
    finally:
        timer.cancel()
        with lock:
            is_over = True
            progress.stop()
