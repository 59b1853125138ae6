"""Formats by layer: the budget is kept, what loses least is narrowed, and the result is a configuration that runs."""

import random
from itertools import product

import pytest
import torch

import kvpass.quality.tune
from kvpass.config import CacheConfig
from kvpass.config_file import read_options, write_config
from kvpass.errors import ConfigError
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig
from kvpass.quality.evaluate import bytes_per_token
from kvpass.quality.replay import Samples
from kvpass.quality.tables import tuning_data, tuning_lines, tuning_table
from kvpass.quality.tune import Budget, choose_formats, dtype_option, parse_budget, tune


@pytest.mark.parametrize(
    ("text", "bytes_per_token"),
    [("640", 640), (" 640B ", 640), ("512.5bytes", 512.5), ("4.5bits", 72), ("8 bits", 128)],
)
def test_a_budget_is_bytes_or_bits(text, bytes_per_token):
    assert parse_budget(text).bytes_per_token(numbers=128) == bytes_per_token


@pytest.mark.parametrize("text", ["", "0", "-3", "many", "4.5 bit", "1e3"])
def test_a_budget_that_is_none_is_an_error(text):
    with pytest.raises(ConfigError, match="no size of a token"):
        parse_budget(text)


def best(costs, budget):
    """The smallest loss that keeps the budget, by trying everything."""
    choices = product(*(cost.values() for cost in costs))
    return min(sum(loss for _, loss in choice) for choice in choices if sum(size for size, _ in choice) <= budget)


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_keeps_the_budget_and_is_the_best_where_losses_are_convex(seed):
    draw = random.Random(seed)
    costs = []
    for _ in range(4):
        first, second = sorted((draw.random(), draw.random()))  # each step of 8 bytes costs more than the one before
        costs.append({"wide": (32, 0.0), "middle": (24, first), "narrow": (16, first + second)})
    for budget in range(64, 129, 8):
        chosen = choose_formats(costs, budget)
        assert sum(cost[name][0] for cost, name in zip(costs, chosen, strict=True)) <= budget
        loss = sum(cost[name][1] for cost, name in zip(costs, chosen, strict=True))
        assert loss == pytest.approx(best(costs, budget))


@pytest.mark.parametrize("seed", range(30))
def test_any_losses_and_sizes_keep_the_budget_and_waste_none_of_it(seed):
    draw = random.Random(seed)
    costs = [{name: (draw.randrange(1, 40), draw.random()) for name in "abc"} for _ in range(5)]
    least = sum(min(size for size, _ in cost.values()) for cost in costs)
    budget = least + draw.randrange(60)
    chosen = choose_formats(costs, budget)
    left = budget - sum(cost[name][0] for cost, name in zip(costs, chosen, strict=True))
    assert left >= 0
    for cost, name in zip(costs, chosen, strict=True):
        better = [size for size, loss in cost.values() if loss < cost[name][1] and size > cost[name][0]]
        assert all(size - cost[name][0] > left for size in better), "one more part could be wider"


def test_a_budget_that_nothing_keeps_names_what_would():
    with pytest.raises(ConfigError, match="cannot be kept: the narrowest of the formats take 12"):
        choose_formats([{"a": (4, 0.1)}, {"a": (9, 0.0), "b": (8, 0.1)}], 11)


def test_a_configuration_says_the_exceptions_alone():
    assert dtype_option([("int8", "int8")] * 3) == "int8"
    assert dtype_option([("int8", "int4")] * 2) == {"key": "int8", "value": "int4"}
    mixed = [("int4", "int4"), ("bfloat16", "int4"), ("int4", "int4")]
    assert dtype_option(mixed) == {"default": "int4", "layers": {1: {"key": "bfloat16", "value": "int4"}}}
    assert CacheConfig(dtype=dtype_option(mixed)).formats(3) == tuple(mixed)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = PyDecoder(PyDecoderConfig(40, 16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24)).eval()
    with torch.no_grad():  # the last layer's attention counts for nothing, and so may be as coarse as it likes
        model.layers[1].attention.o_proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def samples():
    ids = torch.randint(40, (2, 24), generator=torch.Generator().manual_seed(2))
    return Samples("some", ids, torch.arange(24).expand(2, 24) > 0)


@pytest.mark.slow
def test_a_model_is_tuned_where_it_does_not_hurt(model, samples, monkeypatch, tmp_path):
    engines = []
    losses = kvpass.quality.tune._losses
    monkeypatch.setattr(kvpass.quality.tune, "_losses", lambda *given: (engines.append(given[1]), losses(*given))[1])
    said = []
    # float32 takes 32 bytes of a token's keys, or values; int8 12 and int4 8.
    found = tune(model, [samples], ["float32", "int8", "int4"], Budget(80, "bytes"), 8, said.append)
    assert [(part.cache, part.kind) for part in found.parts] == [
        (f"layers.{i}.attention", kind) for i in range(2) for kind in ("keys", "values")
    ]
    assert [part.chosen for part in found.parts] == ["float32", "float32", "int4", "int4"]
    assert found.bytes_per_token == 80 == bytes_per_token(engines[-1][0].plan)
    assert found.kl == found.predicted_kl == 0.0 and found.agreement == 1.0
    assert all(part.costs["int4"][1] > part.costs["int8"][1] > 0 for part in found.parts[:2])
    assert found.dtype == {"default": "float32", "layers": {1: "int4"}} and "measure what was chosen" in said
    write_config(tmp_path / "tuned.json", {"dtype": found.dtype})
    assert read_options(tmp_path / "tuned.json") == {"dtype": found.dtype}
    assert tuning_table("tiny", found).row_count == 4
    assert tuning_lines(found)[0] == "80 bytes per token, of 80 allowed"
    assert tuning_data("tiny", found)["parts"][2]["chosen"] == "int4"


@pytest.mark.slow
def test_a_budget_is_checked_before_anything_is_measured(model, samples, monkeypatch):
    monkeypatch.setattr(kvpass.quality.tune, "_losses", None)
    with pytest.raises(ConfigError, match="narrowest of the formats take 48"):
        tune(model, [samples], ["int8"], Budget(40, "bytes"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is no cache configuration"),
        ('{"dtypes": "int8"}', "is no cache configuration"),
        ('{"dtype": "int5"}', "is not a cache dtype"),
        ('{"dtype": {"default": "int8", "layers": {"first": "int4"}}}', "does not map numbers of layers"),
    ],
)
def test_a_file_that_holds_no_configuration_is_an_error(tmp_path, content, complaint):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        read_options(tmp_path / "config.json")


def test_a_configuration_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        write_config(tmp_path / "nowhere" / "config.json", {})
