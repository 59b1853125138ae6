"""What the report says of a decoder is what the decoder's author wrote, and the cache is as narrow as it can be."""

import pytest

import kvpass
from tests.decoders import heads
from tests.decoders.skeleton import HEAD_DIM, HEADS
from tests.parity.compiled import engine_of

FLOAT, LAYERS = 4, 2


def both(kv_heads: int, layers: int = LAYERS, value_dim: int = HEAD_DIM) -> int:
    """Bytes per token of keys and values in float32."""
    return FLOAT * layers * kv_heads * (HEAD_DIM + value_dim)


GROUPED, FULL = both(heads.KV_HEADS), both(HEADS)

# name: bytes per token as the attention received keys and values, and the most that the cache may take
BYTES = {
    "GQA by repeat_interleave": (FULL, GROUPED),
    "GQA by expand and reshape": (FULL, GROUPED),
    "GQA by tiling, head h % Hkv": (FULL, GROUPED),
    "GQA by enable_gqa": (GROUPED, GROUPED),
    "MQA with keys of two dims": (both(1), both(1)),
    "MQA by expand": (FULL, both(1)),
    "values narrower than keys": (both(HEADS, value_dim=8), both(heads.KV_HEADS, value_dim=8)),
    "keys are values": (FULL, FULL // 2),
    "latent keys and values": (both(HEADS) + FLOAT * LAYERS * HEADS * 8, FLOAT * LAYERS * (16 + 8)),
    "keys and values shared across layers": (FULL, both(HEADS, layers=1)),
    "one block run three times": (both(HEADS, layers=3), both(HEADS, layers=3)),
}

# name: the mask of each attention, in the order of the layers
MASKS = {
    "einsum, tril of ones": ["causal"] * 2,
    "GPT-2 with a tril buffer slice": ["causal, up to 128 tokens"] * 2,
    "band of triu and tril, rotary": ["sliding window 9"] * 2,
    "window by distance, float mask": ["sliding window 7"] * 2,
    "window in every other layer": ["sliding window 9", "causal", "sliding window 9"],
    "ALiBi from aranges": ["causal + ALiBi"] * 2,
    "one block run three times": ["causal"] * 3,
}


def report_of(name: str) -> kvpass.RewriteReport:
    return engine_of(name).report


@pytest.mark.sampled(24, 3)
@pytest.mark.parametrize("name", BYTES)
def test_cache_is_as_narrow_as_it_can_be(name: str) -> None:
    before, most = BYTES[name]
    report = report_of(name)
    assert report.bytes_per_token_before == before
    assert report.bytes_per_token <= most
    assert report.to_dict()["bytes_per_token"] == report.bytes_per_token


@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_named(name: str) -> None:
    report = report_of(name)
    assert [site.mask for site in report.sites] == MASKS[name]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("GPT-2 with a tril buffer slice", ["h.0.attn", "h.1.attn"]),
        ("GQA by repeat_interleave", ["layers.0.mixer", "layers.1.mixer"]),
        ("one block run three times", ["block.mixer"] * 3),
        ("time first, bmm on merged heads", ["", ""]),
    ],
)
def test_sites_bear_the_path_of_their_module(name: str, paths: list[str]) -> None:
    report = report_of(name)
    assert [site.module_path for site in report.sites] == paths
    assert len({site.name for site in report.sites}) == len(paths)


@pytest.mark.slow
@pytest.mark.sampled(22, 3)
def test_scores_are_described() -> None:
    capped = report_of("softcap and q/k norms").sites[0]
    assert capped.softcap == pytest.approx(3.0) and capped.scale == pytest.approx(1.0) and not capped.sinks
    scaled = report_of("window by distance, float mask").sites[0]
    assert scaled.scale == pytest.approx(0.3) and scaled.softcap is None and scaled.spelling == "sdpa"
    sinks = report_of("sink column").sites[0]
    assert sinks.sinks and sinks.spelling == "softmax"


@pytest.mark.parametrize("name", ["GQA by repeat_interleave", "MQA by expand", "ALiBi from aranges"])
def test_report_prints_as_a_table(name: str) -> None:
    report = report_of(name)
    text = str(report)
    for site in report.sites:
        assert site.name in text
        assert site.mask in text
    assert f"{report.bytes_per_token} bytes per token" in text
