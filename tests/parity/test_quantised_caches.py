"""A model whose layers store their caches in every format: proven exact, then measured; sharing changes no token."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import kvpass
from kvpass import compiler
from kvpass.engine.engine import Engine
from kvpass.errors import ConfigError, VerificationError
from kvpass.fx_passes.graph import arguments, is_call
from kvpass.fx_passes.lowering import store_in_formats
from kvpass.fx_passes.validation import calibrate, rounded_caches
from kvpass.kernels.formats.cache_formats import FORMATS, CacheFormat, pack_slabs, quantise_rows, unpack_slabs
from kvpass.kernels.reference import cache as reference_cache
from tests.decoders import heads
from tests.decoders.skeleton import HEAD_DIM, VOCAB, Decoder, decoder, decoder_around
from tests.parity.harness import SEED, ragged_prompts

DTYPE = {
    "default": "int4",
    "layers": {0: "fp8_e4m3", 1: {"key": "int8", "value": "fp8_e5m2"}, -1: "float32"},
}
STORED = [("fp8_e4m3",) * 2, ("int8", "fp8_e5m2"), ("int4",) * 2, ("float32",) * 2]
CONFIG = {"block_size": 16, "dtype": DTYPE}
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = decoder(lambda: Decoder(heads.RepeatInterleave, num_layers=4))(SEED)
    return kvpass.compile(model, kvpass.CacheConfig(**CONFIG, num_blocks=64))


def another(engine: Engine, **options: object) -> Engine:
    """An engine of its own blocks over the same module."""
    return Engine(engine.module, engine.plan, kvpass.CacheConfig(**CONFIG, **options), engine.report)


@pytest.mark.slow
def test_every_layer_is_stored_in_its_format_and_takes_the_bytes_that_are_reported(engine: Engine) -> None:
    assert [(spec.key_format, spec.value_format) for spec in engine.plan.caches] == STORED
    row = {"fp8_e4m3": 12, "fp8_e5m2": 12, "int8": 12 + 4, "int4": 6 + 4, "float32": 48}
    for site, pair, formats in zip(engine.report.sites, engine.caches, STORED, strict=True):
        assert site.format == (formats[0] if formats[0] == formats[1] else ", ".join(formats))
        assert site.bytes_per_token == site.kv_heads * sum(row[name] for name in formats)
        assert sum(tensor.nbytes for tensor in pair) == 64 * 16 * site.bytes_per_token
    assert engine.report.bytes_per_token == engine.stats().bytes_reserved // (64 * 16)


def test_the_structure_is_exact_and_what_the_formats_lose_is_told_apart(engine: Engine) -> None:
    found = engine.report.verification
    assert found is not None
    assert found.passed
    assert found.logits_error < 1e-4 < found.format_error < found.format_tolerance < 1.0
    assert "as they are stored" in found.checks[-1]
    for site in engine.report.sites:
        assert site.error < 1e-4 < site.format_error < 0.5
    assert "as stored" in str(engine.report)


def test_the_scales_of_fp8_are_powers_of_two_that_leave_room_and_are_recorded(engine: Engine) -> None:
    chosen = engine.report.calibration
    assert set(chosen) == {"_scale_key_cache_0", "_scale_value_cache_0", "_scale_value_cache_1"}
    for name, scales in chosen.items():
        assert torch.equal(engine.module.graph_module.get_buffer(name).flatten(), torch.tensor(scales))
        assert all(scale == 2.0 ** round(torch.tensor(scale).log2().item()) for scale in scales)
    engine.generate(ragged_prompts(VOCAB), NEW_TOKENS)
    for tensor, name in ((engine.caches[0][0], "fp8_e4m3"), (engine.caches[1][1], "fp8_e5m2")):
        stored = tensor.float().abs().amax()
        assert FORMATS[name].largest / 32 < stored < FORMATS[name].largest


def test_sharing_preemption_and_chunks_do_not_change_a_token(engine: Engine) -> None:
    prompts = ragged_prompts(VOCAB)
    alone = another(engine, num_blocks=64, prefix_sharing=False)
    want = [alone.generate([prompt], NEW_TOKENS)[0] for prompt in prompts]
    shared = another(engine, num_blocks=64)
    assert shared.generate(prompts, NEW_TOKENS) == want
    assert shared.generate(prompts, NEW_TOKENS) == want
    assert shared.stats().prefix_hit_tokens >= 3 * 32
    growing = ragged_prompts(VOCAB, seed=1, lengths=(15, 14, 13))
    want = [alone.generate([prompt], 2 * NEW_TOKENS)[0] for prompt in growing]
    tight = another(engine, num_blocks=5, max_batch_tokens=11)
    assert tight.generate(growing, 2 * NEW_TOKENS) == want
    assert tight.stats().preemptions > 0
    for each in (alone, shared, tight):
        each.check_integrity()


def test_only_formats_that_ask_for_it_put_ops_around_their_caches(engine: Engine) -> None:
    graph = engine.module.graph_module.graph
    ops = torch.ops.kvpass
    writes = [node for node in graph.nodes if is_call(node, ops.write_cache, ops.norm_rotary_write)]
    assert [dict(write.kwargs) for write in writes] == [
        {},
        {"key_format": "int8"},
        {"key_format": "int4", "value_format": "int4"},
        {},
    ]
    rows = [arguments(write)[part] for write in writes for part in ("key", "value")]
    divided = [is_call(beneath_moves(row), torch.ops.aten.div) for row in rows]
    assert divided == [True, True, False, True, False, False, False, False]
    rotations = [n for n in graph.nodes if n.op == "get_attr" and n.target.startswith("_hadamard_4_")]
    assert len(rotations) == 2  # keys and queries of the third layer; those of values and outputs are in the weights
    found = {rotation.role: rotation.reason for rotation in engine.report.rotations}
    assert found["value"] == found["output"] == ""
    assert "computes its rows" in found["key"] and "computes its rows" in found["query"]
    assert f"rotations: 2 in weights of {engine.report.derived_bytes} bytes, 2 in every step" in str(engine.report)


def beneath_moves(node: torch.fx.Node) -> torch.fx.Node:
    """The node that computes what moves only show in another shape."""
    while is_call(node, torch.ops.aten.reshape, torch.ops.aten.transpose, torch.ops.aten.permute):
        node = node.args[0]
    return node


@cache
def captured_once() -> compiler.Recompiler:
    return compiler.Recompiler(decoder_around(heads.RepeatInterleave)(SEED))


@pytest.mark.slow
def test_a_rotation_that_is_not_undone_fails_the_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_in_formats, "hadamard", lambda size: torch.ones(size, size).triu())
    with pytest.raises(VerificationError, match=r"FAILED prefill: logits differ by .* \(bound 5e-04\)"):
        captured_once().compile(kvpass.CacheConfig(dtype="int4", block_size=16, num_blocks=8))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_a_format_costs_is_told_and_is_what_rounding_explains(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compiler.LOGGER, "warning", lambda text, *values: said.append(text % values))
    with captured_once().compile(kvpass.CacheConfig(dtype=dtype, block_size=16, num_blocks=8)) as engine:
        found = engine.report.verification
    assert found is not None and found.passed and found.format_loss > 1e-3
    assert abs(found.format_error - found.format_loss) < 1e-4
    assert any("what that does to text" in text for text in said) == (found.format_loss > 0.1)


def scaled_by(factor: float) -> Callable[..., Any]:
    def quantise(rows: torch.Tensor, form: CacheFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
        codes, tails = quantise_rows(rows, form)
        return codes, None if tails is None else (tails.view(torch.float32) * factor).view(torch.uint8)

    return quantise


def test_a_kernel_that_writes_another_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPASS_BACKEND", "reference")
    monkeypatch.setattr(reference_cache, "quantise_rows", scaled_by(1.05))
    with pytest.raises(VerificationError, match=r"FAILED in these formats: .* rounding alone gives"):
        captured_once().compile(kvpass.CacheConfig(dtype="int8", block_size=16, num_blocks=8))


def test_a_format_that_rounds_by_another_scale_everywhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPASS_BACKEND", "reference")
    for place in (reference_cache, rounded_caches):
        monkeypatch.setattr(place, "quantise_rows", scaled_by(1.05))
    with pytest.raises(VerificationError, match=r"lose more than their format rounds"):
        captured_once().compile(kvpass.CacheConfig(dtype="int8", block_size=16, num_blocks=8))


def test_scales_that_do_not_fit_the_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "MARGIN", 1e-3)
    with pytest.raises(VerificationError, match=r"lose more than their format rounds"):
        captured_once().compile(kvpass.CacheConfig(dtype="fp8_e4m3", block_size=16, num_blocks=8))


def test_the_rotation_is_its_own_inverse_and_spreads_outliers() -> None:
    for size in (1, 2, 16, 64):
        matrix = store_in_formats.hadamard(size)
        assert torch.equal(matrix @ matrix, size * torch.eye(size))
        assert torch.equal(matrix.abs(), torch.ones(size, size))
    rows = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    rows[:, 5] *= 30
    turn = store_in_formats.hadamard(128) / 128**0.5
    plain, turned = (unpack_slabs(pack_slabs(r, FORMATS["int4"]), FORMATS["int4"]) for r in (rows, rows @ turn))
    assert (turned @ turn - rows).norm() < 0.5 * (plain - rows).norm()
    assert HEAD_DIM & -HEAD_DIM == 4


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int3", r"dtype='int3' is not a cache dtype: choose one of auto, float32, .*, int8, int4"),
        (8, r"dtype=8 is not a cache dtype"),
        ({"key": "int8"}, r"dtype=.* must have a format for 'key' and one for 'value'"),
        ({"key": "int8", "value": "int2"}, r"dtype\['value'\]='int2' is not a cache dtype"),
        ({"layers": {0: "int8"}}, r"a dict has 'key' and 'value', or 'default' and, if some layers differ, 'layers'"),
        ({"default": "int8", "heads": {}}, r"has the entries 'default', 'heads': a dict has"),
        ({"default": "int8", "layers": ["int4"]}, r"dtype\['layers'\]=\['int4'\] does not map numbers of layers"),
        ({"default": "int8", "layers": {"first": "int4"}}, r"does not map numbers of layers to formats"),
        ({"default": "int8", "layers": {0: "nope"}}, r"dtype\['layers'\]\[0\]='nope' is not a cache dtype"),
        ({"default": {"key": "int8", "values": "int8"}}, r"dtype\['default'\]=.* must have a format for 'key'"),
    ],
)
def test_a_dtype_that_cannot_be_used_is_named(dtype: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kvpass.CacheConfig(dtype=dtype)


def test_names_that_people_know_stand_for_formats() -> None:
    same = {"fp8": "fp8_e4m3", "bf16": "bfloat16", torch.float8_e5m2: "fp8_e5m2", torch.float16: "float16"}
    for given, meant in same.items():
        assert kvpass.CacheConfig(dtype=given) == kvpass.CacheConfig(dtype=meant)
    given = kvpass.CacheConfig(dtype={"default": torch.bfloat16, "layers": {0: {"key": "fp8", "value": "int8"}}})
    assert given.formats(2) == (("fp8_e4m3", "int8"), ("bfloat16", "bfloat16"))
    assert kvpass.CacheConfig(memory="1TiB").memory_bytes == 2**40


def test_layers_are_counted_from_both_ends() -> None:
    config = kvpass.CacheConfig(dtype=DTYPE)
    assert list(config.formats(4)) == STORED
    assert kvpass.CacheConfig(dtype="int8").formats(2) == (("int8", "int8"),) * 2
    with pytest.raises(ConfigError, match="dtype names the layer 1 twice"):
        config.formats(2)
    with pytest.raises(ConfigError, match="dtype names the layer 1, but the model has 1 attentions"):
        config.formats(1)
