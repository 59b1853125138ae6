"""Launches of the Triton kernels as values: grids from shapes alone, tables that hold every case, errors that help."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kvpass.errors import InputError, KvpassWarning
from kvpass.kernels import backends
from kvpass.kernels.formats.cache_formats import FORMATS
from kvpass.kernels.triton_kernels.device.schedule import most_tiles
from kvpass.kernels.triton_kernels.launch import backend
from kvpass.kernels.triton_kernels.launch.attention_call import AttentionCall, Features, lay_out_attention
from kvpass.kernels.triton_kernels.launch.launch import Target, architecture_of
from kvpass.kernels.triton_kernels.launch.stored import dot_dtype, see_cache, split_width
from kvpass.kernels.triton_kernels.launch.tuning import ROWS, STORAGES, TILES, WIDTHS, choose_rows, choose_tile

H200 = Target("sm_90", 132)


def make_call(tokens: int = 64, sequences: int = 64, width: int = 128, form: str = "bfloat16") -> AttentionCall:
    """A call on tensors without memory: nothing can be read from them."""

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    row = FORMATS[form]
    cache = see_cache(empty(9999, 8, 16, row.stored_width(width), dtype=row.dtype), form, H200)
    query = empty(tokens, 32, width, dtype=torch.bfloat16)
    return AttentionCall(
        query, cache, cache, width, empty(sequences, 512), empty(sequences), empty(sequences + 1), 0.1, Features()
    )


def test_launches_are_made_without_reading_a_tensor() -> None:
    call = make_call()
    schedule, attention, merge = lay_out_attention(call, torch.empty_like(call.query), None, H200)
    tile = choose_tile(H200, 16, 128, 16, 16)
    assert schedule.grid == (1,)
    assert attention.grid == (132 * tile.programs,)
    assert merge.grid[0] == 64 * 8
    assert (attention.warps, attention.stages) == (tile.warps, tile.stages)


def test_partial_sums_have_two_places_for_each_program_however_long_the_sequences() -> None:
    call = make_call(tokens=8, sequences=8)
    attention = lay_out_attention(call, torch.empty_like(call.query), None, H200)[1]
    assert attention.arguments["partial"].shape == (2 * attention.grid[0] * attention.arguments["BLOCK_M"], 128)


def test_the_bound_on_tiles_holds_for_every_way_to_share_the_tokens() -> None:
    for group, rows, sequences in itertools.product((1, 3, 4, 7, 40), (16, 64), (1, 2, 3)):
        for counts in itertools.product(range(0, 9), repeat=sequences):
            needed = sum(-(-count * group // rows) for count in counts)
            assert needed <= most_tiles(sum(counts), sequences, group, rows) or needed == 0


def test_two_pieces_cover_every_width_and_waste_less_than_half() -> None:
    for width in range(1, 577):
        a, b = split_width(width)
        assert a + b >= width
        assert all(piece & (piece - 1) == 0 and piece >= 16 for piece in (a, b) if piece)
        assert a + b < 2 * max(width, 16)
        assert a > b
    assert split_width(576) == (512, 64)


def test_rows_follow_the_mean_number_of_new_tokens() -> None:
    assert choose_rows(64, 64, 4) == 16
    assert choose_rows(64, 64, 32) == 64
    assert choose_rows(8 * 512, 8, 4) == 64
    assert choose_rows(1, 0, 1) == 16


@pytest.mark.parametrize("architecture", TILES)
def test_the_table_has_a_tile_for_every_call(architecture: str) -> None:
    target = Target(architecture, 100)
    for rows, width, bits, size in itertools.product(ROWS, (1, 16, *WIDTHS), STORAGES, (16, 32, 64, 128)):
        if width > 128 and bits == 32:
            continue  # refused
        tile = choose_tile(target, rows, width, bits, size)
        assert tile.rows in (rows, ROWS[0])
        assert tile.keys & (tile.keys - 1) == 0
        assert 16 <= choose_tile(target, rows, width, bits, size, rich=True).keys <= tile.keys
        assert size % tile.keys == 0 or size < 64


def test_architectures_are_the_newest_that_the_device_can_run() -> None:
    assert architecture_of(8, 0) == ("sm_80", False)
    assert architecture_of(8, 9) == ("sm_80", True)
    assert architecture_of(9, 0) == ("sm_90", True)
    assert architecture_of(12, 0) == ("sm_100", True)
    assert architecture_of(9, 4, "gfx942:sramecc+") == ("gfx942", False)


def test_dots_hold_the_elements_of_the_cache_exactly() -> None:
    def name(query: torch.dtype, form: str) -> str:
        return str(dot_dtype(query, FORMATS[form], H200))

    assert name(torch.bfloat16, "bfloat16") == "bf16"
    assert name(torch.bfloat16, "fp8_e4m3") == name(torch.bfloat16, "int4") == name(torch.float16, "int8") == "fp16"
    assert name(torch.float16, "bfloat16") == name(torch.bfloat16, "float32") == name(torch.float32, "int4") == "fp32"


def test_fp8_is_read_as_bytes_where_the_device_has_none() -> None:
    cache, old = torch.zeros(2, 1, 16, 32, dtype=torch.float8_e4m3fn), Target("sm_80", 108, native_fp8=False)
    backends.say_once.cache_clear()
    with pytest.warns(KvpassWarning, match="does not convert fp8_e4m3 itself") as said:
        assert [see_cache(cache, None, old).spelling for _ in range(2)] == ["fp8_e4m3_bytes"] * 2
    assert len(said) == 1
    assert see_cache(cache, None, H200).spelling == "float"


def test_what_the_kernels_cannot_serve_is_refused_with_a_reason() -> None:
    query, cache = torch.zeros(1, 2, 16), torch.zeros(2, 1, 16, 16)
    serve: dict[str, Any] = {"query": query, "key_cache": cache, "value_cache": cache}
    assert backend.unsupported("paged_attention", **serve) is None
    wrong = {
        "float64: the kernels take": {"query": query.double()},
        "power of two": {"key_cache": torch.zeros(2, 1, 12, 16)},
        "wider than 576": {"value_cache": torch.zeros(2, 1, 16, 640)},
    }
    for message, change in wrong.items():
        assert message in str(backend.unsupported("paged_attention", **(serve | change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": torch.ones(1)}, "kvpass::paged_attention: seq_lens is float32; it must be int64 or int32"),
        ({"tree_mask": torch.ones(1, 1)}, "tree_mask is float32; it must be bool"),
        ({"chunk": 0}, "chunk is 0; it must be at least 1"),
        ({"slopes": torch.ones(2, device="meta")}, "slopes is on meta; it must be on cpu, where the query is"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    one = torch.ones(1, dtype=torch.int64)
    arguments = {
        "query": torch.zeros(1, 2, 16),
        "key_cache": torch.zeros(2, 1, 16, 16),
        "value_cache": torch.zeros(2, 1, 16, 16),
        "block_tables": one[None],
        "seq_lens": one,
        "query_start": torch.tensor([0, 1]),
        "scale": 1.0,
    }
    with pytest.raises(InputError, match=message):
        backend.paged_attention(**(arguments | change))
