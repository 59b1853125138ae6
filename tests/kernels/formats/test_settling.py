"""The bytes of k4v2: what a settled slab holds, read by the words of its layout, and what is refused."""

import numpy as np
import pytest
import torch

from kvpass.errors import ConfigError, InputError
from kvpass.fx_passes.planning.choose_formats import final_formats
from kvpass.kernels import ops
from kvpass.kernels.formats.cache_formats import FORMATS, allocate_cache
from kvpass.kernels.formats.settling import read_slabs, settle_slabs, wide_view
from kvpass.types import CacheSpec
from tests.kernels.settled_cases import allowed_errors

SETTLE = torch.ops.kvpass.settle_blocks.default
K4, V2 = FORMATS["k4"], FORMATS["v2"]


@pytest.fixture
def rows():
    """Keys whose channels differ in size, and tokens too: ``[2, 3, 32, 48]``."""
    generator = torch.Generator().manual_seed(5)
    channels = 2.0 ** torch.randint(-6, 7, (48,), generator=generator)
    tokens = 2.0 ** torch.randint(-3, 3, (32, 1), generator=generator)
    return torch.randn(2, 3, 32, 48, generator=generator) * channels * tokens


def test_keys_read_by_hand_are_what_the_kernels_read(rows):
    slabs = settle_slabs(rows, K4)
    assert slabs.shape == (2, 3, 32, 48 * 9 // 16 + 2)
    raw = slabs[1, 2].flatten().numpy()
    nibbles = raw[: 32 * 24].reshape(32, 24)
    codes = np.concatenate((nibbles & 15, nibbles >> 4), 1).astype(int) - 8
    channels = ((raw[32 * 24 : 32 * 24 + 96].astype(np.uint32) + 761) << 20).view(np.float32).reshape(2, 48)
    scales = (raw[32 * 24 + 96 :].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    numbers = codes * np.repeat(channels, 16, 0) * scales[:, None]
    np.testing.assert_allclose(read_slabs(slabs, K4)[1, 2].numpy(), numbers, rtol=1e-6)
    assert abs(codes).max() == 7 and channels.max() == 1
    error = (torch.from_numpy(numbers) - rows[1, 2]).abs()
    assert (error <= allowed_errors(rows, "k4")[1, 2]).all()


def test_values_read_by_hand_are_what_the_kernels_read(rows):
    slabs = settle_slabs(rows, V2)
    assert slabs.shape == (2, 3, 32, 48 // 4 + 2)
    raw = slabs[0, 1].flatten().numpy()
    packed = raw[: 32 * 12].reshape(32, 12)
    codes = np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    scales = (raw[32 * 12 :].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    numbers = (codes - 1.5) * scales[:, None]
    np.testing.assert_allclose(read_slabs(slabs, V2)[0, 1].numpy(), numbers, rtol=1e-6)
    error, largest = (torch.from_numpy(numbers) - rows[0, 1]).double(), rows[0, 1].double().abs().amax(1)
    assert (error.square().mean(1).sqrt() <= 0.2503 * largest).all()


def test_a_scale_per_channel_is_worth_more_than_one_per_token(rows):
    keys = rows[:1, :1]
    coarse = keys.abs().amax(-1, keepdim=True) / 7
    by_token = ((keys / coarse).round() * coarse - keys) / keys.std((0, 1, 2))
    by_channel = (read_slabs(settle_slabs(keys, K4), K4) - keys) / keys.std((0, 1, 2))
    assert by_channel.square().mean() < by_token.square().mean() / 20


def test_a_row_that_is_not_finite_stays_visible_and_spoils_no_other(rows):
    for form in (K4, V2):
        spoilt = rows.clone()
        spoilt[0, 0, 3, 5], spoilt[0, 0, 4, 6] = torch.inf, torch.nan
        numbers = read_slabs(settle_slabs(spoilt, form), form)
        assert numbers[0, 0, 3:5].isnan().all()
        numbers[0, 0, 3:5] = 0
        assert (numbers - torch.where(numbers == 0, 0, rows)).abs().max() < rows.abs().max()
        assert numbers.isfinite().all()
        assert not read_slabs(settle_slabs(torch.zeros(1, 1, 16, 48), form), form).any()


def test_bytes_per_token_and_room_for_wide_blocks():
    spec = CacheSpec("layers.0", 3, 128, 64, "k4", "v2")
    keys, values = allocate_cache(spec, 10, 32, "cpu", 4)
    assert K4.bytes_per_token(1, 128) * 8 / 128 == 4.625
    assert (V2.bytes_per_token(1, 128) + K4.bytes_per_token(1, 128)) * 8 / 256 == 3.375
    for cache, form, dim in ((keys, K4, 128), (values, V2, 64)):
        settled, wide = 32 * form.bytes_per_token(3, dim), 32 * 3 * dim * 2
        assert 10 * settled + 4 * wide <= cache.nbytes < 11 * settled + 4 * wide
        assert len(wide_view(cache, form)) >= 4
        wide_view(cache, form)[-4:] = 1
        assert not cache[:10].any(), "a wide block reaches into a settled one"


def test_what_does_not_fit_is_refused():
    assert ops.argument_names("settle_blocks") == ("caches", "formats", "source", "target")
    spec = CacheSpec("layers.0", 1, 128, 0, "bfloat16", "bfloat16")
    with pytest.raises(ConfigError, match=r"layers.0 cannot be stored so: its values are part of the rows of its keys"):
        final_formats(spec, ("k4", "v2"))
    with pytest.raises(ConfigError, match=r"multiples of 16 \(of keys\) and of 4 \(of values\), not 40"):
        K4.stored_width(40)
    keys, values = allocate_cache(CacheSpec("x", 1, 16, 16, "k4", "v2"), 4, 16, "cpu", 4)
    plain, step = torch.zeros(4, 1, 16, 16), (torch.tensor([[0]]), torch.tensor([1]), torch.tensor([0, 1]))
    query = torch.zeros(1, 1, 16)
    with pytest.raises(InputError, match="neither goes without the other"):
        torch.ops.kvpass.paged_attention(query, keys, plain, *step, 1.0, key_format="k4")
    with pytest.raises(InputError, match="a latent cache has one row for both"):
        torch.ops.kvpass.latent_attention(query, keys, *step, 1.0, 8, format="k4")
    with pytest.raises(InputError, match="blocks of 16, 32, 48"):
        torch.ops.kvpass.write_cache(
            query, query, keys[:, :, :8].contiguous(), values, torch.tensor([-1]), key_format="k4", value_format="v2"
        )
    with pytest.raises(InputError, match="float32 does not settle: use copy_blocks"):
        SETTLE([plain], ["float32"], torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(InputError, match=r"slot_mapping holds 3, permitted are -\d+ to -1"):
        torch.ops.kvpass.write_cache(
            query, query, keys, values, torch.tensor([3]), key_format="k4", value_format="v2"
        )  # fmt: skip
