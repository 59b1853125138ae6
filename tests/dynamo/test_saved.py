"""What torch's cache artifacts take along is found again where it fits, and nowhere else."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.compiler._cache import CacheArtifactManager

import kvpass
from kvpass.dynamo import saved
from kvpass.dynamo.graph_engines import engines_of
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig
from tests.dynamo.toys import OPTIONS, Toy, compiled, tokens, toy
from tests.test_manners import lines_of_log

FOUND = "found a saved graph"


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    saved._LOADED.clear()
    with CacheArtifactManager.with_fresh_cache():
        yield
    saved._LOADED.clear()


def run(model: nn.Module, **options: Any) -> bool:
    """Whether a saved graph was found; what it gives is right."""
    served = compiled(model, on_refusal="error", **options)
    with lines_of_log() as lines, torch.no_grad(), kvpass.cached(served):
        for ids in (tokens(2, 9), tokens(1, 4)):
            wanted = model(ids)[:, -1]
            assert (served(ids)[:, -1] - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    return any(FOUND in line for line in lines)


def artifacts() -> bytes:
    made = torch.compiler.save_cache_artifacts()
    assert made is not None
    return made[0]


def doubled(model: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits * 2


def test_found_where_everything_is_as_it_was() -> None:
    assert not run(toy())
    content = artifacts()
    assert not run(toy())  # they were not loaded
    torch.compiler.load_cache_artifacts(content)
    model: Any = toy()
    assert run(model)
    (found,) = engines_of(model).found.values()
    assert not isinstance(found, Exception)
    assert found.engine.report.verification is not None and found.engine.report.verification.passed
    with torch.no_grad():
        model.qkv.weight.mul_(2)  # followed, as ever
    served = compiled(model)
    with torch.no_grad(), kvpass.cached(served):
        torch.testing.assert_close(served(tokens(2, 9))[:, -1], model(tokens(2, 9))[:, -1], rtol=1e-3, atol=1e-4)
    assert not run(toy(seed=1))  # other weights
    assert not run(toy(Toy, doubled))  # another graph
    assert not run(toy(), block_size=8)  # another cache


def test_what_is_broken_is_proven_anew() -> None:
    run(toy())
    torch.compiler.load_cache_artifacts(artifacts())
    assert saved._LOADED
    for key in saved._LOADED:
        saved._LOADED[key] = saved._LOADED[key][:-100]
    assert not run(toy())


@pytest.mark.slow
@pytest.mark.slow
def test_weights_that_a_rewrite_joins() -> None:
    def decoder() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 37, "d_model": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8, "d_ff": 64}
        return PyDecoder(PyDecoderConfig(**sizes)).eval()

    assert not run(decoder())
    content = artifacts()
    torch.compiler.load_cache_artifacts(content)
    model = decoder()
    assert run(model)
    (found,) = engines_of(model).found.values()
    assert not isinstance(found, Exception)
    joined = [name for name, _ in found.engine.module.graph_module.named_parameters() if "_merged_" in name]
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert joined and max(map(len, saved._LOADED.values())) < weights  # by name, and not by content


def test_saved_ahead_of_time_by_torch(tmp_path: Path) -> None:
    model, ids = toy(), tokens(2, 9)
    made: Any = torch.compile(model, fullgraph=True, backend="kvpass", options=OPTIONS)
    made.forward.aot_compile(((ids,), {})).save_compiled_function(str(tmp_path / "graph"))
    with open(tmp_path / "graph", "rb") as file:
        torch.testing.assert_close(torch.compiler.load_compiled_function(file)(model, ids), model(ids))
    unsaved: Any = torch.compile(model, fullgraph=True, backend="kvpass", options={"inner": lambda graph, _: graph})
    with pytest.raises(kvpass.ConfigError, match="cannot be saved"):
        unsaved.forward.aot_compile(((ids,), {})).save_compiled_function(str(tmp_path / "other"))


def test_the_backend_is_found_without_an_import() -> None:
    script = (
        "import sys, torch\n"
        "assert 'kvpass' in torch.compiler.list_backends() and 'kvpass' not in sys.modules\n"
        "model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))\n"
        "compiled = torch.compile(model, backend='kvpass', options={'inner': 'aot_eager'})\n"
        "logits = compiled(torch.arange(6).view(2, 3))\n"
        "logits.sum().backward()\n"
        "assert torch.equal(logits, model(torch.arange(6).view(2, 3))) and model[0].weight.grad is not None\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)
