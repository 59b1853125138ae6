"""Token ids as text while they come, and the stop strings in it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from typing import Any

from kvpass.errors import InputError

CONTEXT = 8  # tokens before the newest that a decoder may look at: for blanks, and for characters of several tokens
UNFINISHED = "\N{REPLACEMENT CHARACTER}"

Decode = Callable[[list[int]], str]


def decode_of(tokenizer: Any) -> Decode:
    """The function from token ids to text of a tokenizer, or of what is such a function already.

    Raises:
        InputError: if it is neither.
    """
    decode = getattr(tokenizer, "decode", tokenizer)
    if not callable(decode):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}: give an object with decode(token_ids), as those of tokenizers "
            f"and transformers, or a function from token ids to text"
        )
    return decode  # type: ignore[no-any-return]


def decode_after(prompt: Ordered[int], tokens: list[int], decode: Decode) -> str:
    """The text of ``tokens`` where they follow a prompt."""
    context = list(prompt[-CONTEXT:])
    return decode(context + tokens)[len(decode(context)) :]


class TextPieces:
    """Turns the new tokens of one prompt into text, piece by piece; the pieces joined are the whole.

    A token can be a part of a character, and its text can depend on the tokens before it. So the newest tokens are
    decoded together with some older ones, and what has not been given out yet is given once it ends in a character.
    """

    def __init__(self, prompt: Ordered[int], decode: Decode) -> None:
        self._decode = decode
        self._tokens = list(prompt[-CONTEXT:])
        # The text of the first so many is given out already.
        self._given = len(self._tokens)

    def add(self, token: int) -> str:
        """The text that is certain once ``token`` is there; may be empty."""
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        # Nothing before what was given out last is looked at again.
        self._tokens = self._tokens[self._given :]
        self._given = len(self._tokens)
        return text

    def rest(self) -> str:
        """What is left when no more tokens come."""
        return self._new_text()

    def copy(self) -> TextPieces:
        """The same pieces so far, to go on in another way."""
        other = TextPieces((), self._decode)
        other._tokens, other._given = list(self._tokens), self._given
        return other

    def _new_text(self) -> str:
        before = self._decode(self._tokens[: self._given])
        return self._decode(self._tokens)[len(before) :]


class OutputText:
    """The text of a growing output, and whether a stop string has ended it.

    The text ends where the first stop string is complete, as if its characters came one by one: how they are spread
    over tokens makes no difference. Of several that are complete at once, the one that began first counts.

    Attributes:
        num_tokens: tokens of the output that were looked at.
        stopped: whether a stop string was found.
    """

    def __init__(
        self, prompt: Ordered[int], decode: Decode, stop: Ordered[str] = (), include_stop: bool = False
    ) -> None:
        self._pieces = TextPieces(prompt, decode)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._longest = max(map(len, self._stop), default=0)
        self._text = ""
        self.num_tokens = 0
        self.stopped = False

    def add(self, tokens: Ordered[int]) -> bool:
        """Take in the next tokens of the output; True once a stop string was found."""
        for token in tokens:
            if self.stopped:
                break
            self.num_tokens += 1
            self._text, self.stopped = self._with(self._pieces.add(token))
        return self.stopped

    def whole(self) -> str:
        """The text when no more tokens come."""
        return self._text if self.stopped else self._with(self._pieces.rest())[0]

    @property
    def certain(self) -> str:
        """The text without what may turn out to be the beginning of a stop string."""
        if self.stopped or self._include_stop:
            return self._text
        for size in range(min(self._longest - 1, len(self._text)), 0, -1):
            tail = self._text[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return self._text[:-size]
        return self._text

    def copy(self) -> OutputText:
        """The same text so far, to go on in another way."""
        other = OutputText((), self._pieces._decode, self._stop, self._include_stop)
        other._pieces, other._text = self._pieces.copy(), self._text
        other.num_tokens, other.stopped = self.num_tokens, self.stopped
        return other

    def _with(self, piece: str) -> tuple[str, bool]:
        """The text with another piece, up to the first stop string that this completes, and whether there is one."""
        text = self._text + piece
        first = max(0, len(self._text) - self._longest + 1)
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop, first)) >= 0]
        if not found:
            return text, False
        end, start = min(found)
        return text[: end if self._include_stop else start], True
