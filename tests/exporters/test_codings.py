"""Codes and scales apart are those of the library, byte for byte, and stand for the same numbers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kvpass.exporters.dialects.coded_caches import CODINGS, coded, decode, encode, pieces, row_width, uncoded
from kvpass.kernels.formats.cache_formats import FORMATS, dequantise_rows, quantise_rows, read_tails

FP8 = ("fp8_e4m3", "fp8_e5m2")


def rows() -> Tensor:
    """Rows of many sizes, among them zeros, equal numbers, exact halves of codes, and what is not finite."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(400, 3, 16, generator=generator) * torch.exp(4 * torch.randn(400, 3, 1, generator=generator))
    found[0], found[1] = 0.0, 7.5
    found[2] = torch.arange(16) - 7.5
    found[2, :, 0] = 127.0
    found[3, 0, 4], found[3, 1, 5], found[3, 2, 6] = torch.nan, torch.inf, -torch.inf
    found[4] *= 1e-37
    return found


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_scales_are_those_of_the_library(name: str, dtype: torch.dtype) -> None:
    form, given = FORMATS[name], rows().to(dtype)
    codes, tails = quantise_rows(given, form)
    assert tails is not None
    found = encode(given, (), name)
    assert [part.dtype for part in found] == [piece.dtype for piece in pieces(form, 16)]
    assert [part.shape[-1] for part in found] == [piece.width for piece in pieces(form, 16)]
    assert torch.equal(found[0].view(torch.uint8), codes)
    for part, expected in zip(found[1:], read_tails(tails, form), strict=False):
        torch.testing.assert_close(part.squeeze(-1).float(), expected, rtol=0, atol=0, equal_nan=True)
    assert row_width(found, name) == 16
    numbers = decode(found, name, torch.float32)
    torch.testing.assert_close(numbers, dequantise_rows(codes, tails, form), rtol=0, atol=0, equal_nan=True)
    assert decode(found, name, torch.float64).dtype == torch.float64


class Encoder(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, given: Tensor) -> tuple[Tensor, ...]:
        found = encode(given, (), self.name)
        return *(part.float() for part in found), decode(found, self.name, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODINGS)
def test_onnx_runtime_finds_the_same(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    given = rows()
    done = torch.onnx.export(Encoder(name), (given,), dynamo=True, opset_version=23, verbose=False)
    done.save(str(tmp_path / "codes.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "codes.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    expected = Encoder(name)(given)
    equal = [
        (torch.from_numpy(part) == right) | (torch.from_numpy(part).isnan() & right.isnan())
        for part, right in zip(found, expected, strict=True)
    ]
    # int4 chooses among sixteen fits by sums over a row: two that are as good may change places, in a row of a hundred.
    allowed = 0.0 if name == "int8" else 0.01
    for part in equal:
        assert (~part).flatten(0, 1).any(-1).float().mean() <= allowed


@pytest.mark.parametrize("name", FP8)
def test_fp8_saturates_as_the_library_does(name: str) -> None:
    form = FORMATS[name]
    given = torch.cat((rows(), torch.full((1, 3, 16), 1e6), torch.full((1, 3, 16), -464.0)))
    (found,) = encode(given, (torch.empty(0, dtype=form.dtype),), None)
    expected, _ = quantise_rows(given, form)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


def test_formats_that_are_settled_in_blocks_have_no_tensors_of_their_own() -> None:
    assert uncoded({"key_format": "int8", "value_format": "int4"}) is None
    assert uncoded({"key_format": "k4", "value_format": "v2"}) == "a cache in k4"
    assert coded({"format": "int8"}) == "a cache in int8" and coded({"format": None}) is None
