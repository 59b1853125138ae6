"""Token ids as text while they come, and how several growing texts are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from tokenizers import Tokenizer

from kvpass.runtime.sequences.output_text import OutputText
from kvpass.types import Sampling

REFRESHES_PER_SECOND = 10
LINES_ON_SCREEN = 7  # of each text while it grows
LABEL_WIDTH = 60


class TextStream:
    """Turns the new tokens of one prompt into text, piece by piece, up to a stop string if there are any.

    Without a tokenizer the text of a token is its number.
    """

    def __init__(
        self, prompt: Sequence[int], tokenizer: Tokenizer | None, stop: Sequence[str] = (), include_stop: bool = False
    ) -> None:
        self._text = None if tokenizer is None else OutputText(prompt, tokenizer.decode, stop, include_stop)
        self._given = 0
        self._numbers = 0

    def add(self, token: int) -> str:
        """The text that is certain once ``token`` is there; may be empty."""
        if self._text is None:
            self._numbers += 1
            return str(token) if self._numbers == 1 else f" {token}"
        self._text.add([token])
        return self._new(self._text.certain)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return "" if self._text is None else self._new(self._text.whole())

    def _new(self, text: str) -> str:
        new = text[self._given :]
        self._given = len(text)
        return new


class TextsView:
    """Several texts that grow at once: live panels on a terminal, one text after the other elsewhere.

    Use it as a context manager. On a terminal the ends of the texts are seen while they grow; at the end, and anywhere
    else, each is printed whole under its label.
    """

    def __init__(self, console: Console, labels: Sequence[str]) -> None:
        self._console = console
        self._labels = labels
        self._texts = [""] * len(labels)
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                console=console, get_renderable=self._panels, refresh_per_second=REFRESHES_PER_SECOND, transient=True
            )

    def add(self, index: int, text: str) -> None:
        """Append to the text at ``index``."""
        self._texts[index] += text

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if error is not None:
            return
        for label, text in zip(self._labels, self._texts, strict=True):
            self._console.print(Text(label, style="bold cyan"), soft_wrap=True)
            self._console.print(Text(text.strip("\n")), soft_wrap=True)
            self._console.print()

    def _panels(self) -> Group:
        return Group(*map(self._panel, self._labels, self._texts))

    @staticmethod
    def _panel(label: str, text: str) -> Panel:
        shown = "\n".join(text.split("\n")[-LINES_ON_SCREEN:])
        return Panel(Text(shown, no_wrap=True, overflow="ellipsis"), title=Text(label), title_align="left")


def label_of(number: int, prompt: str) -> str:
    """A line that names a prompt: its number and its last line with something in it."""
    lines = [line.strip() for line in prompt.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return f"[{number}] {last}" if len(last) <= LABEL_WIDTH else f"[{number}] ...{last[-LABEL_WIDTH:]}"


def show_texts(
    console: Console,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    tokenizer: Tokenizer | None,
    tokens: Iterable[tuple[int, int]],
    sampling: Sampling,
) -> None:
    """Print the texts that ``tokens``, pairs of a prompt's index and a new token of it, turn into, by ``sampling``.

    The text of a single prompt is written as it comes, with nothing around it.
    """
    streams = [TextStream(prompt, tokenizer, sampling.stop, sampling.include_stop) for prompt in ids]
    if len(prompts) == 1:
        for _, token in tokens:
            console.print(Text(streams[0].add(token)), end="", soft_wrap=True)
        console.print(Text(streams[0].finish()), soft_wrap=True)
        return
    with TextsView(console, [label_of(number, prompt) for number, prompt in enumerate(prompts, 1)]) as view:
        for index, token in tokens:
            view.add(index, streams[index].add(token))
        for index, text in enumerate(streams):
            view.add(index, text.finish())
