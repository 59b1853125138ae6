"""The engine over a k4v2 cache: the tokens are those of the module driven by hand, whatever is shared or preempted."""

import numpy as np
import pytest
import torch

import kvpass
from kvpass.compiler import Recompiler
from kvpass.engine.settling_module import SettlingModule
from kvpass.errors import ConfigError
from kvpass.kernels.formats.cache_formats import FORMATS, allocate_caches
from kvpass.kernels.formats.settling import read_blocks
from kvpass.loading import load_model
from kvpass.models import recall
from kvpass.quality.replay import Replay
from kvpass.runtime.pool.capacity import divide_memory
from kvpass.runtime.pool.wide_blocks import WideBlocks
from kvpass.types import CachePlan, CacheSpec

TO_THE_END = kvpass.Sampling(ignore_eos=True)
MIXED = {"default": "k4v2", "layers": {0: "bfloat16"}}


@pytest.fixture(scope="module")
def recompiler():
    return Recompiler(load_model("recall").model)


@pytest.fixture(scope="module")
def prompts():
    ids = recall.held_out("recall", 4, 256).input_ids
    return [row[: 120 + 37 * i].tolist() for i, row in enumerate(ids)]


def by_hand(engine, prompt, count):
    """Greedy tokens of the module alone, in caches of its own."""
    reader, new, tokens, start = Replay(engine, 1, len(prompt) + count), [], prompt, 0
    while len(new) < count:
        wanted = torch.zeros(1, len(tokens), dtype=torch.bool)
        wanted[0, -1] = True
        new.append(int(reader.step(torch.tensor([tokens]), start, wanted).argmax()))
        start, tokens = start + len(tokens), new[-1:]
    return new


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["k4v2", MIXED], ids=["all layers", "mixed"])
def test_the_tokens_are_those_of_the_module_driven_by_hand(recompiler, prompts, dtype):
    engine = recompiler.compile(kvpass.CacheConfig(dtype=dtype, num_blocks=40), verify=dtype is MIXED)
    for prompt in prompts[2:3] if dtype is MIXED else prompts[:2]:
        engine.clear_prefix_cache()
        assert engine.generate([prompt], 70, TO_THE_END) == [by_hand(engine, prompt, 70)]
        engine.check_integrity()
    if dtype is MIXED:
        found = engine.report.verification
        assert 1e-3 < found.format_error < found.format_tolerance
        assert [site.format for site in engine.report.sites] == ["bfloat16", *["k4, v2"] * 3]
        keys = engine.caches[1][0]
        assert keys.shape[2:] == (32, FORMATS["k4"].stored_width(64))
        assert len(engine.caches[0][0]) == 40


@pytest.mark.slow
def test_batches_prefixes_and_preemption_leave_everything_in_order(recompiler, prompts):
    settings = ({"num_blocks": 28}, {"num_blocks": 28, "max_batch_tokens": 96, "max_sequences": 2}, {"memory": "3MB"})
    for options in settings:
        engine = recompiler.compile(kvpass.CacheConfig(dtype="k4v2", **options), verify=False)
        new = engine.generate([*prompts, prompts[0]], 60, TO_THE_END)
        engine.check_integrity()
        assert [len(tokens) for tokens in new] == [60] * 5
        again = engine.generate([prompts[3]], 8, TO_THE_END)
        engine.check_integrity()
        assert len(again[0]) == 8
        stats = engine.stats()
        assert stats.blocks_used == 0
        assert stats.prefix_hit_tokens > 0
        tensors = {t.data_ptr(): t.nbytes for pair in engine.caches for t in pair}
        slabs = sum(t.nbytes // len(t) for pair in engine.caches for t in pair)
        assert 0 <= sum(tensors.values()) - stats.bytes_reserved < slabs


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["k4v2", MIXED], ids=["all layers", "mixed"])
def test_swapped_out_and_in_the_tokens_are_those_of_one_left_alone(recompiler, prompts, dtype):
    config = kvpass.CacheConfig(dtype=dtype, num_blocks=11, host_memory="64MB", scrub=True)
    engine = recompiler.compile(config, verify=False)
    assert engine.generate(prompts[:2], 70, TO_THE_END) == [by_hand(engine, prompt, 70) for prompt in prompts[:2]]
    engine.check_integrity()
    counts = engine._scheduler.counts
    assert counts.preemptions > 0 and counts.restored_tokens > 20


@pytest.mark.slow
def test_what_was_evicted_gives_the_tokens_that_it_gave_where_it_was(recompiler, prompts, tmp_path):
    """A prompt whose blocks have settled, asked again: found on the device, in host memory, and by a later engine."""
    options, found, asked = {"dtype": "k4v2", "num_blocks": 14}, [], prompts[3][:225]
    for more, others in (({}, []), ({"host_memory": "64MB"}, prompts[:3]), ({"disk": tmp_path}, prompts[:3])):
        engine = recompiler.compile(kvpass.CacheConfig(**options, **more), verify=False)
        engine.generate([prompts[3]], 40, TO_THE_END)
        for other in others:
            engine.generate([other], 2, TO_THE_END)
        if "disk" in more:
            engine.cache.save()
            engine.close()
            engine = recompiler.compile(kvpass.CacheConfig(**options, **more), verify=False)
        before = engine.stats()
        found.append(engine.generate([asked], 12, TO_THE_END))
        after = engine.stats()
        assert after.prefix_hit_tokens - before.prefix_hit_tokens == 224
        assert after.tiers.promoted - before.tiers.promoted == (7 if more else 0)
        engine.check_integrity()
    assert found[0] == found[1] == found[2]


def test_what_is_recalled_is_right(recompiler):
    """The answers that the recall model was trained for, each read back from the cache."""
    engine = recompiler.compile(kvpass.CacheConfig(dtype="k4v2", num_blocks=1), verify=False)
    batch = recall.held_out("recall", 8, 512)
    reader, right = Replay(engine, 8, 512), 0
    for start in range(0, 511, 73):
        end = min(start + 73, 511)
        wanted = batch.scored[:, start + 1 : end + 1]
        logits = reader.step(batch.input_ids[:, start:end], start, wanted)
        right += int((logits.argmax(-1) == batch.input_ids[:, start + 1 : end + 1][wanted]).sum())
    assert right >= 0.98 * int(batch.scored.sum())


def test_memory_is_divided_between_settled_and_wide_blocks(recompiler):
    plan = recompiler.compile(kvpass.CacheConfig(dtype="k4v2", num_blocks=1), verify=False).plan
    settled, wide = 448 * 32, 2048 * 32
    roomy = divide_memory(plan, kvpass.CacheConfig(dtype="k4v2", memory="1GiB"))
    assert roomy.wide_blocks == 64 + 3 * 256 + 1
    assert (
        roomy.num_blocks * settled + roomy.wide_blocks * wide
        <= 2**30
        < (roomy.num_blocks + 1) * settled + roomy.wide_bytes
    )
    assert (roomy.max_batch_tokens, roomy.max_sequences) == (2048, 256)
    tight = divide_memory(plan, kvpass.CacheConfig(dtype="k4v2", memory=40 * wide))
    assert tight.wide_blocks == 10
    assert tight.wide_blocks >= -(-tight.max_batch_tokens // 32) + 3 * tight.max_sequences + 1
    with pytest.raises(ConfigError, match=r"give at least memory=2097152"):
        divide_memory(plan, kvpass.CacheConfig(dtype="k4v2", memory=31 * wide))


def test_what_k4v2_cannot_do_is_said(recompiler):
    with pytest.raises(ConfigError, match="k4v2 needs blocks of at least 16 tokens"):
        kvpass.CacheConfig(dtype=MIXED, block_size=8)
    with pytest.raises(ConfigError, match="is a format of keys and values together"):
        kvpass.CacheConfig(dtype={"key": "k4v2", "value": "int8"})
    engine = recompiler.compile(kvpass.CacheConfig(dtype="k4v2", num_blocks=1), verify=False)
    with pytest.raises(ConfigError, match="takes no trees of drafts: a cache in k4v2 stores blocks as a whole"):
        engine.speculate(kvpass.PromptLookup(branches=2))


def test_blocks_are_copied_whichever_kind_they_are():
    specs = (CacheSpec("a", 1, 16, 16, "k4", "v2"), CacheSpec("b", 1, 16, 16, "float32", "float32"))
    plan = CachePlan(specs, 16, 10)
    caches = allocate_caches(specs, 6, 16, "cpu", 6)
    rows = torch.randn(64, 1, 16, generator=torch.Generator().manual_seed(0))

    class Writer:
        device = torch.device("cpu")

        def __call__(self, step, caches):
            new = rows[step.positions]
            formats = {"key_format": "k4", "value_format": "v2"}
            torch.ops.kvpass.write_cache(new, new, *caches[0], step.slot_mapping[1], **formats)
            torch.ops.kvpass.write_cache(new, new, *caches[1], step.slot_mapping[0])
            return new

    blocks = WideBlocks(6, 6, 16, (None,), lambda block: True)
    module, tables = SettlingModule(Writer(), plan, blocks), torch.tensor([[[2, 5, 0, 3]]])
    for start, end in ((0, 48), (48, 49)):
        where = torch.arange(start, end)
        slots = tables[:, 0, where // 16] * 16 + where % 16
        step = (torch.tensor([end]), torch.tensor([0, end - start]), torch.tensor([end - start - 1]))
        module(kvpass.StepInputs(where, where, slots, tables, *step), caches)
    assert blocks.number(np.array([2, 5, 0, 3, 1, 4])).tolist()[1] == 5  # the second has settled
    module.copy_blocks(caches, [(5, 1), (2, 4)])
    for cache, form in zip(caches[0], (FORMATS["k4"], FORMATS["v2"]), strict=True):
        settled, wide, first, second = read_blocks(cache, form, torch.from_numpy(blocks.number(np.array([5, 1, 2, 4]))))
        torch.testing.assert_close(wide, settled.bfloat16().float(), rtol=0, atol=0)
        assert torch.equal(first, second) and (first[0] - rows[:16, 0]).abs().max() < 0.02
    for cache in caches[1]:
        assert torch.equal(cache[[1, 4]], cache[[5, 2]])
