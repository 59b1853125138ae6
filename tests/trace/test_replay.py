"""Replays of request traces, against what the scheduler must do with them."""

import json
import random

import numpy as np
import pytest
from typer.testing import CliRunner

from kvpass.cli.main import app
from kvpass.config import CacheConfig
from kvpass.errors import InputError
from kvpass.trace.replay import SAMPLES, replay_trace, simulated_engine
from kvpass.trace.requests import TraceRequest, block_tokens, read_trace
from tests.history_engine import VOCABULARY, make_engine


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def hashed(arrival, hashes, output=4, short=0):
    return TraceRequest(arrival, 512 * len(hashes) - short, output, None, tuple(hashes))


def test_published_and_own_lines_are_read(tmp_path):
    rows = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [7, 9]},
        "\n",
        {"arrival": 2.0, "prompt": [1, 2, 3], "output_length": 2},
    ]
    first, second = read_trace(write(tmp_path / "t.jsonl", rows))
    assert first == TraceRequest(0.0, 3, 2, (1, 2, 3))
    assert second == TraceRequest(1.0, 600, 5, None, (7, 9))
    assert len(read_trace(tmp_path / "t.jsonl", limit=1)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1: this is no JSON"),
        ("[1]\n", "line 1: this is no JSON object"),
        ({"prompt": [1], "output_length": 1}, "timestamp=None is no number"),
        ({"arrival": True, "prompt": [1], "output_length": 1}, "arrival=True is no number"),
        ({"arrival": 0, "prompt": [], "output_length": 1}, "prompt is no list of whole numbers"),
        ({"arrival": 0, "prompt": [1.5], "output_length": 1}, "prompt is no list of whole numbers"),
        ({"arrival": 0, "prompt": [1], "output_length": 0}, "output_length=0 is not a whole number of at least 1"),
        ({"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}, "do not cover an input_length"),
        ("", "holds no request"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read_trace(write(tmp_path / "t.jsonl", [row]))
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "nowhere")


def test_equal_hashes_are_equal_tokens_and_others_are_not():
    blocks = [block_tokens(hash_id, 512, 256) for hash_id in (0, 1, -1, 2**63, 12345678901234567890)]
    assert all(block.min() >= 0 and block.max() < 256 for block in blocks)
    assert np.array_equal(blocks[1], block_tokens(1, 512, 256))
    for index, block in enumerate(blocks):
        for other in blocks[:index]:
            assert (block == other).mean() < 0.05
    request = hashed(0.0, [5, 6], short=100)
    assert np.array_equal(request.tokens(256), np.concatenate([block_tokens(h, 512, 256) for h in (5, 6)])[:924])


def conversation(count, seed=0):
    """Requests far apart; each goes on from an earlier one or begins anew, and ends in a block of its own."""
    numbers = random.Random(seed)
    known = [()]
    for index in range(count):
        known.append((*numbers.choice(known)[:2], 1000 + index))
        yield hashed(100.0 * index, known[-1], output=numbers.randint(1, 40))


def test_hits_are_the_longest_common_prefixes_with_earlier_prompts():
    trace = list(conversation(12))
    engine = simulated_engine(CacheConfig(num_blocks=2000, block_size=32), 0.01, 1e-5)
    found = replay_trace(engine, trace)
    prompts = [request.tokens(256) for request in trace]
    expected = 0
    for index, prompt in enumerate(prompts):
        common = [0]
        for other in prompts[:index]:
            size = min(len(prompt), len(other))
            differ = np.flatnonzero(prompt[:size] != other[:size])
            common.append(int(differ[0]) if len(differ) else size)
        expected += max(common) // 32 * 32
    hits = found.hit_rate * sum(map(len, prompts))
    assert expected > 0 and expected <= round(hits) < expected + 32 * len(prompts)
    assert (found.finished, found.preemptions, found.evictions) == (12, 0, 0)
    assert found.output_tokens == sum(request.output_length for request in trace)
    assert found.input_tokens == sum(map(len, prompts))


def test_virtual_time_is_what_the_steps_cost():
    engine = simulated_engine(CacheConfig(num_blocks=200, max_batch_tokens=512), 0.01, 1e-4)
    found = replay_trace(engine, [hashed(0.0, [1, 2], output=5), hashed(50.0, [3], output=1)])
    assert found.seconds == pytest.approx(50 + 0.01 + 512 * 1e-4)
    assert found.first_token.mean == pytest.approx((2 * (0.01 + 512 * 1e-4) + 0.01 + 512 * 1e-4) / 2)
    assert (found.between_tokens.count, found.between_tokens.mean) == (4, pytest.approx(0.0101))
    faster = simulated_engine(CacheConfig(num_blocks=200, max_batch_tokens=512), 0.01, 1e-4)
    assert replay_trace(faster, [hashed(0.0, [1]), hashed(50.0, [3], 1)], speed=10).seconds < 5.1


def test_overload_queues_and_preempts_and_ends_in_bounded_figures():
    trace = [hashed(0.0, [index], output=100) for index in range(30)]
    engine = simulated_engine(CacheConfig(num_blocks=80, block_size=32), 0.001, 0.0)
    found = replay_trace(engine, [*trace, hashed(0.0, list(range(6)), output=10)])
    assert (found.finished, found.too_large, found.output_tokens) == (30, 1, 3000)
    assert max(moment.waiting for moment in found.moments) > 20
    assert all(moment.used + moment.cached + moment.free == 80 for moment in found.moments)
    assert found.evictions > 0 and len(found.moments) <= 2 * SAMPLES + 1
    assert found.moments[-1].running == found.moments[-1].waiting == 0


def test_a_real_model_is_timed_by_the_clock():
    trace = [TraceRequest(0.0, 9, 5, tuple(range(9))), TraceRequest(1000.0, 9, 3, (*range(8), 30))]
    found = replay_trace(make_engine(), trace)
    assert (found.finished, found.output_tokens, found.hit_rate) == (2, 8, 8 / 18)
    assert 1000 < found.seconds < 1060
    with pytest.raises(InputError, match=f"0 to {VOCABULARY - 1}"):
        replay_trace(make_engine(), [TraceRequest(0.0, 1, 1, (VOCABULARY,))])
    short = make_engine(max_length=10)
    assert replay_trace(short, trace).too_large == 2


def test_the_command_prints_and_writes_figures(tmp_path):
    rows = [
        {"timestamp": 100 * index, "input_length": 1000, "output_length": 8, "hash_ids": [1, index]}
        for index in range(5)
    ]
    trace = write(tmp_path / "t.jsonl", rows)
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["trace", str(trace), "--num-blocks", "300", "--out", str(out)])
    assert result.exit_code == 0 and "5 of 5 requests finished" in result.stdout
    data = json.loads(out.read_text())
    assert data["output_tokens"] == 40 and data["hit_rate"] > 0.4 and data["moments"]
    alone = CliRunner().invoke(app, ["trace", str(trace), "--num-blocks", "300", "--no-sharing", "--json"])
    assert json.loads(alone.stdout)["hit_rate"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say how large its pool is with --num-blocks"),
        (["--num-blocks", "9", "--speed", "0"], "speed=0.0 must be a positive number"),
        (["--num-blocks", "9", "--picture", "a.bmp"], "let it end in .png or .svg"),
        (["--num-blocks", "9", "--out", "nowhere/a.json"], "the figures nowhere/a.json cannot be written"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.jsonl", [{"arrival": 0, "prompt": [1, 2], "output_length": 2}])
    result = CliRunner().invoke(app, ["trace", "t.jsonl", *arguments])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_replay_is_drawn(tmp_path, name, begins):
    pytest.importorskip("matplotlib")
    from kvpass.trace.picture import draw_replay

    found = replay_trace(simulated_engine(CacheConfig(num_blocks=300), 0.01, 1e-5), list(conversation(4)))
    draw_replay(found, tmp_path / name, "four requests")
    written = (tmp_path / name).read_bytes()
    assert written.startswith(begins) and len(written) > 10_000
    with pytest.raises(InputError, match="cannot be written"):
        draw_replay(found, tmp_path / "no" / name, "")
