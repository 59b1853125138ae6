from dataclasses import replace

import pytest

from kvpass.fx_passes.planning.group_caches import bytes_of_sequence, group_caches
from kvpass.kernels.formats.cache_formats import allocate_caches, shared_tensors
from kvpass.types import CachePlan, CacheSpec


def layers(windows, **options):
    spec = CacheSpec("", 2, 16, 16, "float32", "float32", **options)
    return [replace(spec, name=str(i), window=window) for i, window in enumerate(windows)]


def groups(windows):
    return [spec.group for spec in group_caches(layers(windows))]


def test_one_window_is_one_group():
    assert groups([None] * 5) == groups([64] * 5) == [0] * 5


def test_every_other_layer():
    assert groups([64, None] * 3) == [0, 1] * 3


def test_five_windows_to_one_without_are_cut_into_pieces_of_equal_size():
    found = groups(([64] * 5 + [None]) * 2)
    assert found == [0, 0, 1, 1, 2, 3, 2, 4, 4, 5, 5, 3]
    assert sorted(found.count(group) for group in set(found)) == [2] * 6


@pytest.mark.parametrize("windowed", [1, 7, 22, 31, 52])
@pytest.mark.parametrize("whole", [1, 4, 10])
def test_a_long_sequence_takes_little_more_than_its_windows_need(windowed, whole):
    specs = group_caches(layers([64] * windowed + [None] * whole))
    length, token = 8 * 64, 2 * 2 * 16 * 4
    least = (windowed * 64 + whole * length) * token
    # Eight groups at most: one layer without a window beside many with one pays for pieces that are too large for it.
    assert least <= bytes_of_sequence(specs, length) <= (2 if whole == 1 else 1.35) * least + 8 * 64 * token
    assert bytes_of_sequence(specs, length) <= (windowed + whole) * length * token
    assert len({spec.group for spec in specs}) <= 8


def test_caches_of_other_bytes_that_cannot_share_memory_are_not_divided():
    specs = [*layers([64] * 3), *(replace(spec, key_dim=24) for spec in layers([None] * 3))]
    assert {spec.group for spec in group_caches(specs)} == {0}


def test_windows_that_are_nearly_equal_are_not_divided():
    assert len(set(groups([64, 63] * 4))) == 1


def test_groups_share_tensors_and_other_shapes_of_equal_bytes_share_their_memory():
    wide = replace(layers([None])[0], num_kv_heads=1, key_dim=32, value_dim=32, name="wide")
    specs = [*layers([64, 64]), wide, replace(wide, key_format="bfloat16", value_format="bfloat16", num_kv_heads=2)]
    specs = [replace(spec, group=group) for spec, group in zip(specs, (0, 0, 1, 1), strict=True)]
    assert shared_tensors(specs) == (0, 1, 0, 1)
    caches = allocate_caches(specs, 4, 8, "cpu")
    assert [tuple(keys.shape) for keys, _ in caches] == [(4, 2, 8, 16)] * 2 + [(4, 1, 8, 32), (4, 2, 8, 32)]
    for first, second in ((caches[0], caches[2]), (caches[1], caches[3])):
        for one, other in zip(first, second, strict=True):
            assert one.data_ptr() == other.data_ptr() and one.nbytes == other.nbytes
            assert one.is_contiguous() and other.is_contiguous()
            other.fill_(1.0)
            assert one.view(other.dtype).eq(1).all()


def test_the_window_of_a_group_is_the_largest_of_its_caches():
    specs = tuple(replace(spec, group=group) for spec, group in zip(layers([9, 5, None]), (0, 0, 1), strict=True))
    assert CachePlan(specs, 4, 10).group_windows == (9, None)
    assert CachePlan((), 4, 10).group_windows == (None,)
