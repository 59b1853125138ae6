"""The demo's pieces at tiny sizes: it says what is true, and the decoders that it measures compute the same."""

import io
import itertools
import json

import pytest
import torch
from rich.console import Console

from kvpass.cli import demo
from kvpass.cli.terminal import progress_bar, stage
from kvpass.cli.text_stream import TextStream, TextsView, label_of
from kvpass.errors import InputError
from kvpass.models.pydecoder import CHECKPOINT, PyDecoder, PyDecoderConfig, load_tokenizer
from kvpass.quality.contiguous_peer import ContiguousDecoder
from kvpass.quality.measure import (
    Contender,
    EngineDecoder,
    UncachedDecoder,
    count_agreeing,
    time_side_by_side,
    write_result,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def held_out():
    return (CHECKPOINT / "heldout.txt").read_text(encoding="utf-8")


def tiny_decoder(**sizes):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 48} | sizes
    return PyDecoder(PyDecoderConfig(**sizes)).eval()


def plain_console(file):
    return Console(file=file, width=160, highlight=False)


def terminal_console(file):
    return Console(file=file, width=100, force_terminal=True, highlight=False)


@pytest.mark.parametrize(
    "prompts",
    [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]], [[1, 2, 3, 4], [5], [7, 8, 9] * 5], [[9], [8, 7]]],
    ids=["one", "equal lengths", "ragged", "one token apart"],
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_the_contiguous_cache_computes_what_the_model_computes(heads, prompts):
    model = tiny_decoder(vocab_size=64, num_heads=heads[0], num_kv_heads=heads[1])
    cached, uncached = ContiguousDecoder(model, len(prompts), 48), UncachedDecoder(model)
    for _ in range(2):  # the second time over what the first one left behind
        tokens = cached.start(prompts)
        assert tokens == uncached.start(prompts)
        for _ in range(24):
            following = cached.step(tokens)
            assert following == uncached.step(tokens)
            tokens = following


def test_without_a_cache_a_padded_batch_gives_the_tokens_of_each_prompt_alone():
    model = tiny_decoder(vocab_size=64)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    together = UncachedDecoder(model)
    steps = [together.start(prompts)]
    for _ in range(6):
        steps.append(together.step(steps[-1]))
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        for step in steps:
            assert step[index] == int(model(torch.tensor([ids]))[0, -1].argmax())
            ids.append(step[index])


class Counts:
    """A decoder whose tokens are the number of the step."""

    def __init__(self):
        self.steps = 0

    def start(self, prompts):
        self.steps = 0
        return [0] * len(prompts)

    def step(self, tokens):
        assert tokens == [self.steps] * len(tokens)
        self.steps += 1
        return [self.steps] * len(tokens)


def test_decoders_take_turns_and_warming_up_does_not_count():
    reports = itertools.count()
    contenders = [Contender("long", Counts(), 5), Contender("short", Counts(), 2)]
    timings = time_side_by_side(contenders, [[1], [2]], turns=3, after_each=lambda: next(reports))
    assert next(reports) == 8
    assert (len(timings["long"].step_seconds), len(timings["short"].step_seconds)) == (15, 6)
    assert timings["short"].tokens == [list(range(7))] * 2
    assert timings["short"].tokens_per_second == pytest.approx(2 / timings["short"].seconds_per_step)


def test_when_time_is_up_no_further_turns_begin():
    timings = time_side_by_side([Contender("one", Counts(), 5)], [[1]], turns=3, seconds=0.0)
    assert len(timings["one"].step_seconds) == 5


def test_the_number_of_threads_is_put_back():
    torch.set_num_threads(2)
    try:
        timings = time_side_by_side([Contender("one", Counts(), 1)], [[1]], turns=2)
        assert torch.get_num_threads() == 2 and timings["one"].threads in (1, 2)
    finally:
        torch.set_num_threads(1)


class Drips:
    """An engine that has tokens for one prompt only."""

    def clear_prefix_cache(self):
        pass

    def stream(self, prompts, max_new_tokens, sampling):
        yield from ((0, token) for token in range(max_new_tokens))


def test_an_engine_whose_sequences_are_out_of_step_is_not_timed():
    with pytest.raises(InputError, match="raise max_batch_tokens"):
        EngineDecoder(Drips(), 4).start([[1], [2]])


def test_tokens_agree_up_to_the_first_difference():
    assert count_agreeing([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5]]) == (3, 5)


def test_a_result_says_when_and_on_what_it_was_measured(tmp_path):
    path = write_result(tmp_path / "results", "speed", {"steps": 3}, [{"length": 64, "ms": 1.5}])
    content = json.loads(path.read_text())
    assert path.name == "speed.json" and content["results"] == [{"length": 64, "ms": 1.5}]
    assert {"processor", "cores", "threads", "python", "torch", "kvpass"} <= content["machine"].keys()
    assert content["date"] and content["options"] == {"steps": 3}


def test_the_prompts_share_about_a_thousand_tokens(tokenizer, held_out):
    ids = [tokenizer.encode(prompt).ids for prompt in demo.demo_prompts(held_out)]
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*ids, strict=False)))
    assert len(ids) == len({tuple(prompt) for prompt in ids}) == 4
    assert shared >= 960
    assert all(960 < len(prompt) <= 1088 for prompt in ids)


@pytest.mark.slow
def test_the_demo_runs_and_its_figures_are_those_of_the_run(tokenizer):
    prompts = [f"{'x = [1, 2, 3]' * 12}\n{stub}" for stub in ("def f(x):\n", "class A:\n")]
    file = io.StringIO()
    figures = demo.run(plain_console(file), tiny_decoder(), tokenizer, prompts, demo.DemoSizes(10, turns=3, steps=4))
    text = file.getvalue()
    ours = figures.timings[demo.PAGED].tokens
    assert [len(tokens) for tokens in ours] == [13, 13]
    assert count_agreeing(ours, figures.timings[demo.CONTIGUOUS].tokens) == (26, 26)
    assert count_agreeing(ours, figures.timings[demo.UNCACHED].tokens) == (8, 8)
    assert 0 < figures.blocks_shared < figures.blocks_used
    assert figures.stats.bytes_peak_used <= figures.stats.bytes_reserved
    for words in (
        "attention sites",
        "[1] def f(x):",
        "[2] class A:",
        "tokens/s",
        "verification passed",
        "same greedy tokens as no cache: 8 of 8",
        f"blocks shared: {figures.blocks_shared} of {figures.blocks_used}",
    ):
        assert words in text
    assert "\x1b" not in text


@pytest.mark.parametrize("text", ["def f(x):\n\treturn x\n", "\u00e9\u4e2d\U0001f600 = 1\n" * 3, "    pass\n"])
def test_streamed_pieces_are_the_whole_text(tokenizer, text):
    prompt = tokenizer.encode("class A:\n").ids
    stream = TextStream(prompt, tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode(text).ids]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


def test_half_a_character_is_given_out_at_the_end(tokenizer):
    first = tokenizer.encode("\U0001f600").ids[0]
    stream = TextStream([], tokenizer)
    assert stream.add(first) == "" and stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_without_a_tokenizer_the_text_is_the_numbers():
    stream = TextStream([1, 2], None)
    assert stream.add(3) + stream.add(44) + stream.finish() == "3 44"


@pytest.mark.parametrize("make_console, coloured", [(plain_console, False), (terminal_console, True)])
def test_texts_and_stages_are_plain_unless_on_a_terminal(make_console, coloured):
    file = io.StringIO()
    console = make_console(file)
    with stage(console, "load"), progress_bar(console, "measure", 2) as advance:
        advance()
    with TextsView(console, ["[1] first", "[2] second"]) as view:
        view.add(1, "[b]not markup[/b]\n")
        view.add(0, "    x = 1\n")
    text = file.getvalue()
    assert ("\x1b" in text) is coloured
    assert "load: " in text and "measure: " in text and "[b]not markup[/b]" in text and "    x = 1" in text
    assert text.rindex("[1] first") < text.rindex("[2] second")


def test_a_view_that_fails_prints_nothing_more():
    file = io.StringIO()
    with pytest.raises(KeyError), TextsView(plain_console(file), ["[1] first"]) as view:
        view.add(0, "text")
        raise KeyError
    assert file.getvalue() == ""


def test_a_label_is_the_last_line_with_something_in_it():
    assert label_of(3, "import os\ndef f():\n\n") == "[3] def f():"
    assert label_of(1, "") == "[1] "
    assert len(label_of(1, "x" * 500)) < 80
