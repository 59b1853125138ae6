"""Stop strings against a search that goes character by character, however the text is cut into tokens."""

import random

import pytest

from kvpass.errors import InputError
from kvpass.runtime.sequences.output_text import OutputText, decode_of
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import Sampling

# Tokens are pieces of a text's bytes, so that a character may take several of them.
BYTES = [bytes([value]) for value in b"abc\n"] + ["\u00e9".encode()[:1], "\u00e9".encode()[1:], b"ab", b"bca", b"\n\n"]


def decode(tokens):
    return b"".join(BYTES[token] for token in tokens).decode("utf-8", errors="replace")


def character_by_character(text, stops, include):
    """The text up to the first stop string that is complete, and whether there is one."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end if include else end - max(map(len, found))], True
    return text, False


def whole_characters(tokens):
    """Tokens in which halves of characters come in pairs."""
    return [part for token in tokens for part in ((4, 5) if token in (4, 5) else (token,))]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_wherever_tokens_are_cut(include):
    numbers = random.Random(0)
    stopped = 0
    for _ in range(400):
        stops = tuple("".join(numbers.choices("abc\n\u00e9", k=numbers.randint(1, 4))) for _ in range(3))
        tokens = whole_characters([numbers.randrange(len(BYTES)) for _ in range(numbers.randint(1, 15))])
        prompt = [numbers.randrange(4) for _ in range(numbers.randint(1, 12))]
        text = OutputText(prompt, decode, stops, include)
        given = ""
        for token in tokens:
            if text.add([token]):
                break
            assert text.certain.startswith(given)
            given = text.certain
        expected, found = character_by_character(decode(tokens), stops, include)
        assert (text.whole(), text.stopped) == (expected, found)
        assert expected.startswith(given), "something was given out that does not belong to the text"
        if found:
            stopped += 1
            fewer = decode(tokens[: text.num_tokens - 1])
            assert not character_by_character(fewer, stops, include)[1], "it stopped later than it could"
    assert 100 < stopped < 400


def test_a_copy_goes_on_by_itself():
    text = OutputText([0], decode, ["bca"])
    text.add([0, 4])
    other = text.copy()
    assert other.add([5, 7]) and other.whole() == "a\u00e9"
    assert text.add([5, 0]) is False and text.whole() == "a\u00e9a"


def test_a_sequence_ends_with_the_token_that_completes_a_stop_string():
    sequence = Sequence([0], 10, Sampling(), 0, stop_ids=(2,), text=OutputText([0], decode, ["abb"]))
    for token in (1, 6, 7, 1):
        if sequence.finish_reason is None:
            sequence.append(token)
    assert (sequence.output, sequence.finish_reason, sequence.text.whole()) == ([1, 6, 7], "stop", "b")


def test_a_token_that_was_interrupted_before_its_text_is_read_with_the_next():
    sequence = Sequence([0], 10, Sampling(), 0, text=OutputText([0], decode, ["cb"]))
    sequence.append(2)
    sequence._tokens[sequence.num_tokens] = 1
    sequence.num_tokens += 1
    sequence.append(0)
    assert sequence.finish_reason == "stop"


def test_a_tokenizer_that_fails_ends_the_sequence_with_its_message():
    def broken(tokens):
        if len(tokens) > 2:
            raise KeyError("no such token")
        return "x"

    sequence = Sequence([0], 10, Sampling(), 0, text=OutputText([0], broken, ["y"]))
    sequence.append(1)
    sequence.append(1)
    assert sequence.finish_reason == "error"
    assert "stop strings: KeyError: 'no such token'" in sequence.failure


def test_a_tokenizer_is_an_object_that_decodes_or_a_function():
    class Tokenizer:
        def decode(self, tokens):
            return decode(tokens)

    assert decode_of(Tokenizer())([0, 1]) == decode_of(decode)([0, 1]) == "ab"
    with pytest.raises(InputError, match="tokenizer is a int: give an object with decode"):
        decode_of(3)
