"""Text in, text out: the calls of an engine that has a tokenizer, beside those that take token ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kvpass.config import check_sampling
from kvpass.errors import ConfigError, InputError
from kvpass.runtime.sequences.output_text import Decode, OutputText, decode_of
from kvpass.types import Sampling, TokenLogprobs

if TYPE_CHECKING:
    from kvpass.engine.handle import Handle

NEW_TOKENS = 256  # most new tokens where the caller does not say
OPTIONS = frozenset(field.name for field in fields(Sampling))
NO_TOKENIZER = "the engine has no tokenizer: give one, kvpass.compile(model, tokenizer=...), or pass token ids"
Message = Mapping[str, Any]


@dataclass(frozen=True)
class TextOutput:
    """What continues one prompt.

    Attributes:
        text: without special tokens, and up to the stop string that ended it.
        token_ids: the new tokens, the one that ended it included.
        finish_reason: ``"length"`` after ``max_new_tokens``; ``"stop"`` after an end-of-sequence token, a token of
            ``stop_token_ids`` or a string of ``stop``; or another of :attr:`kvpass.Handle.finish_reason`.
        prompt_tokens: tokens of the prompt.
        logprobs: one entry for each new token, where ``logprobs`` asked for them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def completion_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.token_ids)

    def __str__(self) -> str:
        return self.text


class TextCalls:
    """The calls that take text.

    Each takes a :class:`kvpass.Sampling`, its options by name (``temperature=0.8, top_p=0.9, stop="\\n"``), or both.
    What neither says is as the model's own generation config has it, and greedy where there is none.

    Attributes:
        tokenizer: as it was given to :func:`kvpass.compile`; None without one.
        text_sampling: how tokens are chosen where a call does not say.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self.text_sampling = Sampling()
        self._decode: Decode | None = None if tokenizer is None else decode_of(tokenizer)

    if TYPE_CHECKING:
        submit: Callable[..., Handle]

    def generate_text(
        self,
        prompts: str | Ordered[str],
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling | None = None,
        *,
        n: int = 1,
        **options: Any,
    ) -> list[TextOutput]:
        """Continue texts.

        Args:
            prompts: one text, or several.
            max_new_tokens: most new tokens of each.
            sampling: how tokens are chosen.
            n: how many samples to continue each text with. Sample ``i`` of text ``p`` is at ``p * n + i``.
            options: those of :class:`kvpass.Sampling`, instead of what ``sampling`` says.

        Raises:
            InputError: if the engine has no tokenizer that can encode, or a prompt or a number cannot be used.
            ConfigError: if an option cannot be used.
            CapacityError: if the pool is too small for one of the requests even alone.
            KvpassError: if a request failed.
        """
        texts = _texts(prompts)
        chosen = self._sampling(sampling, options)
        ids = [self._encoded(text) for text in texts]
        handles: list[Handle] = []
        try:
            handles = [self.submit(prompt, max_new_tokens, chosen, n=n) for prompt in ids]
            return [
                self._output(sample, prompt, chosen)
                for prompt, handle in zip(ids, handles, strict=True)
                for sample in handle.samples
            ]
        finally:
            for handle in handles:
                handle.cancel()

    def stream_text(
        self, prompt: str, max_new_tokens: int = NEW_TOKENS, sampling: Sampling | None = None, **options: Any
    ) -> Generator[str, None, None]:
        """Continue a text, and yield what comes piece by piece; a piece never splits a character.

        The pieces joined are the ``text`` that :meth:`generate_text` gives. Input is checked at the call. To stop
        early, leave the loop and call ``close()`` on the generator. Arguments and errors are those of
        :meth:`generate_text`.
        """
        (text,) = _texts(prompt)
        return self._streamed(self._encoded(text), max_new_tokens, self._sampling(sampling, options))

    def chat(
        self,
        messages: Ordered[Message],
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> TextOutput:
        """The next message of a conversation, by the chat template of the tokenizer.

        What was said before is computed once: later calls find it in the prefix cache.

        Args:
            messages: ``{"role": "user", "content": "..."}`` and so on, as the template takes them.
            max_new_tokens: most new tokens.
            sampling: how tokens are chosen.
            options: those of :class:`kvpass.Sampling`, instead of what ``sampling`` says.

        Raises:
            InputError: if the tokenizer has no chat template, or the template does not take the messages.
        """
        chosen = self._sampling(sampling, options)
        ids = self._templated(messages)
        handle = self.submit(ids, max_new_tokens, chosen)
        try:
            return self._output(handle, ids, chosen)
        finally:
            handle.cancel()

    def stream_chat(
        self,
        messages: Ordered[Message],
        max_new_tokens: int = NEW_TOKENS,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> Generator[str, None, None]:
        """As :meth:`chat`, piece by piece as :meth:`stream_text`."""
        return self._streamed(self._templated(messages), max_new_tokens, self._sampling(sampling, options))

    def _streamed(self, ids: list[int], max_new_tokens: int, sampling: Sampling) -> Generator[str, None, None]:
        handle = self.submit(ids, max_new_tokens, sampling)
        return self._pieces(handle, ids, sampling)

    def _pieces(self, handle: Handle, ids: list[int], sampling: Sampling) -> Generator[str, None, None]:
        text, given = self._output_text(ids, sampling), 0
        try:
            for token in handle:
                text.add([token])
                certain = text.certain
                if len(certain) > given:
                    yield certain[given:]
                    given = len(certain)
            if rest := text.whole()[given:]:
                yield rest
        finally:
            handle.cancel()

    def _output(self, handle: Handle, ids: list[int], sampling: Sampling) -> TextOutput:
        tokens = handle.result()
        text = self._output_text(ids, sampling)
        text.add(tokens)
        return TextOutput(
            text.whole(), tuple(tokens), handle.finish_reason or "cancelled", len(ids), tuple(handle.logprobs)
        )

    def _output_text(self, ids: list[int], sampling: Sampling) -> OutputText:
        return OutputText(ids, _without_special_tokens(self.tokenizer), sampling.stop, sampling.include_stop)

    def _sampling(self, sampling: Sampling | None, options: dict[str, Any]) -> Sampling:
        if sampling is not None and not isinstance(sampling, Sampling):
            raise ConfigError(f"sampling={sampling!r} is no kvpass.Sampling: give one, or its options by name")
        unknown = sorted(options.keys() - OPTIONS)
        if unknown:
            raise ConfigError(f"there is no option {unknown[0]!r}: kvpass.Sampling has {', '.join(sorted(OPTIONS))}")
        for name in ("stop", "stop_token_ids"):
            value = options.get(name)
            if isinstance(value, str | int):
                options[name] = (value,)
            elif isinstance(value, list):
                options[name] = tuple(value)
        chosen = replace(sampling or self.text_sampling, **options)
        check_sampling(chosen)
        return chosen

    def _encoded(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise InputError(NO_TOKENIZER)
        encode = getattr(self.tokenizer, "encode", None)
        if not callable(encode):
            raise InputError(f"tokenizer is a {type(self.tokenizer).__name__} and cannot encode: give token ids")
        found = encode(text)
        ids = list(getattr(found, "ids", found))
        if not ids:
            raise InputError(f"the prompt {text!r} has no tokens: a model needs at least one to continue")
        return ids

    def _templated(self, messages: Ordered[Message]) -> list[int]:
        if self.tokenizer is None:
            raise InputError(NO_TOKENIZER)
        apply = getattr(self.tokenizer, "apply_chat_template", None)
        if not callable(apply) or getattr(self.tokenizer, "chat_template", True) is None:
            raise InputError(
                "the tokenizer has no chat template: pass a tokenizer of transformers that has one, or write the "
                "prompt out and call generate_text"
            )
        try:
            return list(apply(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False))
        except Exception as error:  # jinja's, or what the template itself raises
            raise InputError(f"the chat template does not take these messages: {error}") from error


def _texts(prompts: str | Ordered[str]) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError("prompts are no texts: give a string, or a list of strings; for token ids call generate")
    return list(texts)


def _without_special_tokens(tokenizer: Any) -> Decode:
    decode: Callable[..., str] = decode_of(tokenizer)
    try:
        takes = "skip_special_tokens" in inspect.signature(decode).parameters
    except (TypeError, ValueError):  # a function of C has no signature; that of tokenizers leaves them out by itself
        takes = False
    return partial(decode, skip_special_tokens=True) if takes else decode
