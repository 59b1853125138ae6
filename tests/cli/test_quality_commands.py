"""``kvpass eval`` and ``kvpass tune``: figures to standard output, a configuration for generate, errors in a line."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from kvpass.cli.main import app
from kvpass.config_file import read_options

MODELS = """
import torch
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig


def build():
    torch.manual_seed(0)
    return PyDecoder(PyDecoderConfig(40, 16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24))
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    (folder / "quality_models.py").write_text(MODELS)
    (folder / "ids.txt").write_text(" ".join(str(number * number % 40) for number in range(150)))
    (folder / "apart.json").write_text(
        '{"dtype": {"default": "int8", "layers": {"-1": {"key": "int8", "value": "int4"}}}}'
    )
    (folder / "int4.json").write_text('{"dtype": "int4"}')
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


TEXT = ("--text", "ids.txt", "--model", "quality_models:build", "--window", 50)


@pytest.mark.slow
def test_eval_gives_its_figures_as_json(run):
    result = run(
        "eval",
        *TEXT,
        "--formats",
        "float32, int4",
        "--config",
        "apart.json",
        "--config",
        "int4.json",
        "--new-tokens",
        4,
        "--json",
        "--chunk",
        16,
    )
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert found["model"] == "quality_models:build"
    assert [row["format"] for row in found["formats"]] == ["float32", "int4", "apart", "int4.json"]
    exact, coarse, apart, _ = found["formats"]
    assert exact["scores"]["text"]["tokens"] == 3 * 49 and exact["scores"]["text"]["kl"] == 0
    assert coarse["scores"]["text"]["kl"] > apart["scores"]["text"]["kl"] > 0
    assert (coarse["bytes_per_token"], apart["bytes_per_token"]) == (4 * 8, 3 * 12 + 8)


@pytest.mark.slow
def test_tune_writes_a_configuration_that_generate_reads(run, folder):
    result = run("tune", *TEXT, "--formats", "int8,int4", "--budget", "10bits", "--tokens", 100, "--out", "tuned.json")
    assert result.exit_code == 0, result.output
    assert "KL divergence in nats" in result.stdout and "40 bytes per token, of 40 allowed" in result.stdout
    assert f"CacheConfig(dtype={read_options(folder / 'tuned.json')['dtype']!r})" in result.stdout
    generated = run(
        "generate", "--model", "quality_models:build", "--prompt", "1 2 3", "-n", 3, "--config", "tuned.json"
    )
    assert generated.exit_code == 0 and len(generated.stdout.split()) == 3


BAD = {
    "a model without a text": (["eval", "--model", "quality_models:build"], "give --text FILE"),
    "an unknown format": (["eval", *TEXT, "--formats", "int5"], "is not a cache dtype"),
    "a text that is not there": (["eval", *TEXT[2:], "--text", "no.txt"], "the text no.txt cannot be read"),
    "no format": (["eval", *TEXT, "--formats", " , "], "no format is to be measured"),
    "no place for what is found": (
        ["tune", *TEXT, "--budget", "10bits", "--out", "no/folder/tuned.json"],
        "it must be a file in a folder that exists",
    ),
    "no budget": (["tune", *TEXT, "--budget", "small"], "budget='small' is no size of a token"),
    "no configuration": (["generate", "-m", "quality_models:build", "-p", "1", "--config", "ids.txt"], "as JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_one_line(run, case):
    arguments, complaint = BAD[case]
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and complaint in result.stderr
