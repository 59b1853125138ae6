"""Formats of the cache are measured on what the paged module reads from it, and the figures are what they say."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kvpass.cli.terminal import output
from kvpass.compiler import Recompiler
from kvpass.config import CacheConfig
from kvpass.engine.engine import Engine
from kvpass.errors import InputError
from kvpass.loading import LoadedModel, load_model
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig
from kvpass.quality.eval_sets import EvalSets, EvalSizes, eval_sets, spread, text_sets
from kvpass.quality.evaluate import calibration_text, compare, evaluate
from kvpass.quality.replay import Replay, Samples, replay
from kvpass.quality.tables import markdown_table, quality_data, quality_table
from kvpass.types import CachePlan

VOCABULARY, LAYERS, HEAD_DIM = 40, 2, 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> PyDecoder:
    torch.manual_seed(0)
    config = PyDecoderConfig(VOCABULARY, 16, LAYERS, num_heads=2, num_kv_heads=1, head_dim=HEAD_DIM, d_ff=24)
    return PyDecoder(config).eval()


@pytest.fixture(scope="module")
def recompiler(model: PyDecoder) -> Recompiler:
    return Recompiler(model)


@pytest.fixture(scope="module")
def engine(recompiler: Recompiler) -> Engine:
    return recompiler.compile(CacheConfig(dtype="float32", num_blocks=1, block_size=4), verify=False)


@pytest.fixture(scope="module")
def samples() -> Samples:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (3, 23), generator=generator)
    scored = torch.rand(3, 23, generator=generator) < 0.4
    scored[:, 0] = scored[:, 7:13] = False  # chunks in which nothing is scored
    return Samples("some", ids, scored)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_replayed_logits_are_those_of_the_model(model, engine, samples, chunk):
    with torch.no_grad():
        whole = model(samples.input_ids)[:, :-1]
    found = list(replay([engine], samples, chunk))
    wanted = samples.scored[:, 1:]
    starts = [start for start in range(0, 22, chunk) if wanted[:, start : start + chunk].any()]
    assert len(found) == len(starts)
    for (targets, (logits,)), start in zip(found, starts, strict=True):  # each chunk sequence by sequence
        part = wanted[:, start : start + chunk]
        assert torch.equal(targets, samples.input_ids[:, start + 1 : start + 1 + chunk][part])
        torch.testing.assert_close(logits, whole[:, start : start + chunk][part], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.slow
def test_one_capture_serves_several_configurations(recompiler, engine, samples):
    again = recompiler.compile(CacheConfig(dtype="float32", num_blocks=8, block_size=8), verify=False)
    assert again.plan.caches == engine.plan.caches and again.module is not engine.module
    first, second = compare([engine, again], samples)
    assert second.kl == pytest.approx(0.0, abs=1e-9) and second.perplexity == pytest.approx(first.perplexity)


def test_earlier_tokens_are_read_from_the_cache(engine, samples):
    reader = Replay(engine, 3, 23)
    every = torch.ones(3, 4, dtype=torch.bool)
    assert reader.step(samples.input_ids[:, :4], 0, every).isfinite().all()
    for keys, values in reader.caches:
        keys[reader.tables[0, 1, 0]] = values[reader.tables[0, 1, 0]] = math.nan
    logits = reader.step(samples.input_ids[:, 4:8], 4, every).view(3, 4, -1)
    assert logits[1].isnan().all() and logits[[0, 2]].isfinite().all()


def test_perplexity_and_accuracy_are_those_of_the_model(model, engine, samples):
    (scores,) = compare([engine], samples, chunk=6)
    with torch.no_grad():
        logits = model(samples.input_ids)[:, :-1][samples.scored[:, 1:]]
    targets = samples.input_ids[samples.scored]
    assert scores.tokens == len(targets)
    assert scores.perplexity == pytest.approx(math.exp(F.cross_entropy(logits, targets).item()), rel=1e-4)
    assert scores.accuracy == pytest.approx((logits.argmax(-1) == targets).float().mean().item())
    assert (scores.kl, scores.agreement) == (0.0, 1.0)


class Constant:
    """Gives the same logits whatever the step is."""

    device = torch.device("cpu")

    def __init__(self, logits: list[float]) -> None:
        self.logits = torch.tensor(logits)

    def __call__(self, step, caches):
        return self.logits.expand(len(step.logits_index), -1)


def constant(*probabilities: float) -> Engine:
    return SimpleNamespace(module=Constant([math.log(p) for p in probabilities]), plan=CachePlan((), 4, 3))


def test_fp8_is_calibrated_with_the_text_that_is_given(recompiler, samples):
    config = CacheConfig(dtype="fp8_e4m3", num_blocks=1)
    scales = [
        recompiler.compile(config, verify=False, examples=ids).report.calibration
        for ids in (calibration_text([samples]), torch.zeros(1, 2, dtype=torch.int64))
    ]
    assert scales[0].keys() == scales[1].keys() != set()
    assert calibration_text([samples]).shape[0] <= 2 and calibration_text([]) is None
    assert scales[0] != scales[1]  # of two tokens alike less is seen


def test_divergence_and_agreement_have_their_closed_form():
    samples = Samples("coin", torch.tensor([[0, 0, 1, 2]]), torch.tensor([[False, True, True, True]]))
    first, second, third = compare([constant(0.5, 0.3, 0.2), constant(0.2, 0.3, 0.5), constant(0.4, 0.3, 0.3)], samples)
    assert first.kl == 0.0 and first.perplexity == pytest.approx((0.5 * 0.3 * 0.2) ** (-1 / 3))
    assert second.kl == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.2 * math.log(0.2 / 0.5))
    assert third.kl == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.3))
    assert [score.agreement for score in (first, second, third)] == [1.0, 0.0, 1.0]
    assert [score.accuracy for score in (first, second, third)] == pytest.approx([1 / 3] * 3)


def test_a_cache_that_gives_nan_is_not_called_good():
    samples = Samples("coin", torch.tensor([[0, 1]]), torch.tensor([[False, True]]))
    broken = SimpleNamespace(module=Constant([math.nan, 0.0, 0.0]), plan=CachePlan((), 4, 3))
    _, scores = compare([constant(0.5, 0.3, 0.2), broken], samples)
    assert math.isnan(scores.kl) and math.isnan(scores.perplexity)


def test_samples_without_a_scored_token_are_an_error(engine, samples):
    with pytest.raises(InputError, match="no token of some is scored"):
        compare([engine], replace(samples, scored=torch.zeros_like(samples.scored)))


@pytest.mark.slow
def test_formats_are_measured_side_by_side(model, samples):
    apart = {"default": "int8", "layers": {0: {"key": "float32", "value": "int4"}}}
    rows = evaluate(
        model, {"float32": "float32", "int8": "int8", "apart": apart}, [samples], samples.input_ids[:, :5], 6, chunk=4
    )
    assert [row.format for row in rows] == ["float32", "int8", "apart"]
    int8, int4 = HEAD_DIM + 4, HEAD_DIM // 2 + 4
    sizes = [LAYERS * 2 * HEAD_DIM * 4, LAYERS * 2 * int8, HEAD_DIM * 4 + int4 + 2 * int8]
    assert [row.bytes_per_token for row in rows] == sizes
    assert [row.bits_per_element for row in rows] == [8 * size / (LAYERS * 2 * HEAD_DIM) for size in sizes]
    exact, int8_row, mixed = rows
    assert exact.greedy_in_common == 1.0 and exact.scores["some"].kl == exact.scores["generated"].kl == 0.0
    assert exact.scores["generated"].tokens == 3 * 6
    assert 0 < int8_row.scores["some"].kl < mixed.scores["some"].kl < 0.1
    assert [row["format"] for row in quality_data("tiny", rows)["formats"]] == ["float32", "int8", "apart"]
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "| apart |" in lines[-1] and "100.0%" in lines[2]
    assert quality_table("tiny", rows).row_count == 3
    output().print(quality_table("tiny", rows))


def test_pieces_are_spread_over_the_text():
    pieces = spread(torch.arange(100), 10, 4)
    assert pieces.shape == (4, 10) and pieces[0, 0] == 0 and pieces[-1, -1] == 99
    assert (pieces.diff(dim=1) == 1).all()


def test_a_short_text_is_one_window():
    sets = text_sets(torch.arange(50), EvalSizes(window=1024, prompt_tokens=8, prompts=2))
    (text,) = sets.samples
    assert text.input_ids.shape == (1, 50) and text.tokens == 49 and sets.prompts.shape == (2, 8)
    with pytest.raises(InputError, match="has 8 tokens: give one of more than 8"):
        text_sets(torch.arange(8), EvalSizes(prompt_tokens=8))


def test_shipped_models_bring_what_they_are_measured_on():
    tasks = eval_sets(load_model("recall"), None, EvalSizes(task_rows=4, task_length=64))
    assert [each.name for each in tasks.samples] == ["recall", "copy"] and tasks.prompts is None
    text = eval_sets(load_model("pydecoder"), None, EvalSizes(text_tokens=4096, window=512))
    assert text.samples[0].input_ids.shape == (8, 512) and isinstance(text, EvalSets)


def test_other_models_need_a_text(model, tmp_path: Path):
    loaded = LoadedModel("other", model)
    with pytest.raises(InputError, match="other comes with no text"):
        eval_sets(loaded, None, EvalSizes())
    with pytest.raises(InputError, match="cannot be read"):
        eval_sets(loaded, tmp_path / "nothing.txt", EvalSizes())
    (tmp_path / "ids.txt").write_text(" ".join(map(str, range(40))))
    sets = eval_sets(loaded, tmp_path / "ids.txt", EvalSizes(prompt_tokens=4, prompts=1))
    assert sets.samples[0].input_ids.tolist() == [list(range(40))]
