"""Caches in codes leave the library as tensors that any runtime reads; what is wrong with one of them is found."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvpass
from kvpass.exporters.audit import AuditResult, judge
from kvpass.exporters.checks.probes import make_probe
from kvpass.exporters.dialects import coded_caches, plain_ops
from kvpass.exporters.dialects.coded_caches import CODINGS, Coding
from kvpass.exporters.dialects.contracts import Paged
from kvpass.exporters.dialects.exported_step import ExportedStep
from kvpass.exporters.dialects.lowerings import Call
from kvpass.exporters.dialects.plain_ops import PLAIN
from kvpass.exporters.drivers import paged_decoder
from kvpass.exporters.formats import FORMATS
from kvpass.exporters.play_probe import ask
from tests.decoders.catalogue import DECODERS

WINDOW, LATENT, SINKS = "window by distance, float mask", "latent by einsum, low-rank queries", "sinks as gates"
MIXED = {"key": "int8", "value": "int4"}
EngineOf = Callable[[str, Any], kvpass.Engine]
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def engine_of() -> Iterator[EngineOf]:
    made: dict[str, kvpass.Engine] = {}

    def find(name: str, dtype: Any) -> kvpass.Engine:
        if f"{name} {dtype}" not in made:
            config = kvpass.CacheConfig(block_size=8, num_blocks=1, dtype=dtype)
            made[f"{name} {dtype}"] = kvpass.compile(DECODERS[name](6), config, verify=False)
        return made[f"{name} {dtype}"]

    yield find
    for engine in made.values():
        engine.close()


class Program:
    """A step of the dialect ``plain``, run as it is: what `aoti` compiles, and what `onnx-paged` translates."""

    def __init__(self, module: kvpass.PagedModule, **sizes: int) -> None:
        self.step = ExportedStep(module, PLAIN, Paged(says_widest=True), gives_caches=False)
        self.manifest = {
            "cache": {"block_size": module.plan.block_size, "groups": len(module.plan.group_windows)},
            "inputs": [{"name": port.name} for port in self.step.ports],
        }
        self.caches = [
            torch.zeros([sizes[size] if isinstance(size, str) else size for size in port.shape], dtype=port.dtype)
            for port in self.step.ports
            if port.cache is not None
        ]

    @torch.no_grad()
    def run(self, **inputs: Any) -> Any:
        values = [torch.as_tensor(np.asarray(array)) for array in inputs.values()]
        return self.step(*values, *self.caches).float().numpy()


def audited(engine: kvpass.Engine, patch: Patch, plant: Callable[[Patch], None] = lambda patch: None) -> AuditResult:
    """What the audit says of a step; a fault is planted once the model's own answers are known."""
    module = engine.module
    assert isinstance(module, kvpass.PagedModule)
    probe = make_probe(module, None, by_reference=True)
    plant(patch)
    patch.setattr(paged_decoder, "Program", lambda folder, **sizes: Program(module, **sizes))
    return judge(Path("folder"), probe, ask(paged_decoder.Decoder(Path()), probe["script"]))


CASES = [(name, dtype) for dtype in ("int8", "int4", MIXED, "fp8_e4m3", "fp8_e5m2") for name in (WINDOW, LATENT, SINKS)]


@pytest.mark.sampled(16, 5)
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_a_step_gives_the_logits_of_the_model(name: str, dtype: Any, engine_of: EngineOf, monkeypatch: Patch) -> None:
    found = audited(engine_of(name, dtype), monkeypatch)
    assert found.rows >= 25 and found.error <= found.bound < (0.2 if "fp8" in str(dtype) else 0.05)
    assert found.error < 1e-3


def recode(patch: Patch, name: str, encode: Any = None, decode: Any = None) -> None:
    """Exchange what becomes of rows in a format, given what was right."""
    right = CODINGS[name]
    changed = Coding(
        right.pieces,
        right.encode if encode is None else lambda rows: encode(rows, *right.encode(rows)),
        right.decode if decode is None else lambda held, dtype: decode(right, held, dtype),
    )
    patch.setitem(coded_caches.CODINGS, name, changed)


def scale_of_the_neighbour(patch: Patch) -> None:
    recode(patch, "int8", decode=lambda right, held, dtype: right.decode((held[0], held[1].roll(1, -2)), dtype))


def codes_rounded_down(patch: Patch) -> None:
    def encode(rows: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(scales > 0, rows / scales, 0.0).floor().clamp(-127, 127).to(torch.int8), scales

    recode(patch, "int8", encode=encode)


def scale_of_128_steps(patch: Patch) -> None:
    recode(patch, "int8", encode=lambda rows, codes, scales: (codes, scales * (127 / 128)))


def one_scale_for_all_heads(patch: Patch) -> None:
    recode(patch, "int8", encode=lambda rows, codes, scales: (codes, scales.amax(1, keepdim=True).expand_as(scales)))


def scales_exchanged_between_keys_and_values(patch: Patch) -> None:
    before = plain_ops._gather

    def gather(call: Call, name: str) -> Tensor:
        other = {"key_cache": "value_cache", "value_cache": "key_cache"}[name]
        held = (call[name][0], call[other][1])
        return before(Call(call.op, call.target, {**call.given, name: held}, call.caches, call.step), name)

    patch.setattr(plain_ops, "_gather", gather)


def scale_left_as_it_was_where_one_is(patch: Patch) -> None:
    before = plain_ops.write_rows

    def write(cache: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        if rows.shape[2] == 1:
            size = cache.shape[2]
            old = cache[slots // size, :, slots % size]
            rows = torch.where(old != 0, old, rows)
        return before(cache, rows, slots)

    patch.setattr(plain_ops, "write_rows", write)


def halves_exchanged(patch: Patch) -> None:
    recode(patch, "int4", encode=lambda rows, codes, *more: (codes // 16 + codes % 16 * 16, *more))


def no_offset(patch: Patch) -> None:
    recode(patch, "int4", decode=lambda right, held, dtype: right.decode((*held[:2], 0 * held[2]), dtype))


FAULTS: dict[str, Any] = {
    "the scale of the neighbour": ("int8", scale_of_the_neighbour),
    "codes rounded down": ("int8", codes_rounded_down),
    "a scale of 128 steps": ("int8", scale_of_128_steps),
    "one scale for all heads": ("int8", one_scale_for_all_heads),
    "scales exchanged": ("int8", scales_exchanged_between_keys_and_values),
    "a scale left as it was": ("int8", scale_left_as_it_was_where_one_is),
    "halves exchanged": pytest.param("int4", halves_exchanged, marks=pytest.mark.slow),
    "no offset": pytest.param("int4", no_offset, marks=pytest.mark.slow),
}


@pytest.mark.parametrize(("dtype", "plant"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_caught(dtype: Any, plant: Callable[[Patch], None], engine_of: EngineOf, monkeypatch: Patch) -> None:
    with pytest.raises(kvpass.VerificationError, match="the logits of sequence"):
        audited(engine_of(WINDOW, dtype), monkeypatch, plant)


FILES = [("onnx-paged", "int8", LATENT), ("onnx", "int8", WINDOW)]
REST = [
    (format, dtype, name)
    for format in ("onnx-paged", "onnx", "aoti")
    for dtype in ("int8", "int4", MIXED, "bfloat16")
    for name in (WINDOW, LATENT, SINKS)
    if (format, dtype, name) not in FILES
]


@pytest.mark.parametrize(
    ("format", "dtype", "name"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in FILES),
        *(pytest.param(*case, marks=pytest.mark.sweep) for case in REST),
    ],
    ids=str,
)
def test_the_file_gives_the_logits_of_the_model(
    format: str, dtype: Any, name: str, engine_of: EngineOf, tmp_path: Path
) -> None:
    context = {"context": 96} if FORMATS[format].is_static else {}
    result = engine_of(name, dtype).export(tmp_path / "out", format, **context)
    assert result.audit is not None and result.audit.rows >= 25
