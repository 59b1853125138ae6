"""What the planner says is what the pool allocates and the scheduler admits."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvpass.cli.main import app
from kvpass.config import CacheConfig
from kvpass.errors import InputError
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig
from kvpass.planner import Demand, Shape, bytes_text, plan_lines, plan_memory, plan_model, plan_shape
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.capacity import allocate_caches, count_blocks
from kvpass.types import CachePlan
from tests.history_engine import make_engine

SMALL = Shape(layers=3, kv_heads=2, head_dim=16, query_heads=8)


def test_a_published_shape_takes_what_its_numbers_say():
    """32 layers, 8 KV heads of dim 128 in 16 bit: 2 * 32 * 8 * 128 * 2 bytes = 128 KiB per token."""
    found = plan_shape(Shape(32, 8, 128, query_heads=32), 2, CacheConfig(memory="80GiB"), Demand(4096))
    received, cut = found.stages
    assert (received.bytes_per_token, cut.bytes_per_token) == (512 * 2**10, 128 * 2**10)
    assert (cut.bytes_of_sequence, cut.fit) == (512 * 2**20, 160)
    assert (received.bytes_of_sequence, received.fit) == (2 * 2**30, 40)
    int4 = plan_shape(Shape(32, 8, 128), 2, CacheConfig(memory="80GiB", dtype="int4"), Demand(4096)).stages[-1]
    assert int4.bytes_per_token == 32 * 8 * 2 * (128 // 2 + 4)  # a float32 scale for each row


@pytest.mark.parametrize("dtype", ["auto", "float32", "int8", "int4", "fp8_e5m2"])
@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_the_tensors_take_what_was_planned(dtype, block_size):
    config = CacheConfig(memory="3MiB", dtype=dtype, block_size=block_size)
    found = plan_shape(SMALL, 2, config, Demand(100))
    stored = SMALL.plan("bfloat16" if dtype == "auto" else dtype, block_size)
    caches = allocate_caches(stored, count_blocks(stored, config), "cpu")
    assert sum(tensor.nbytes for pair in caches for tensor in pair) == found.bytes_reserved <= 3 * 2**20
    assert found.num_blocks * found.bytes_per_block == found.bytes_reserved
    last = found.stages[-1]
    assert last.bytes_of_sequence == -(-100 // block_size) * block_size * last.bytes_per_token


def admitted(num_blocks, block_size, context, prefix):
    """How many sequences of ``context`` cached tokens an engine really runs at once."""
    engine = make_engine(num_blocks=num_blocks, block_size=block_size, max_sequences=1000, max_batch_tokens=10**6)
    common = [1] * prefix
    # The last token of all is generated, and its cache never needed.
    prompts = [common + [2 + (index + at) % 30 for at in range(context - prefix)] for index in range(40)]
    running = []
    engine.module.before_step = lambda step: running.append(len(step.seq_lens))
    engine.generate(prompts, 1)
    return running[0]


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize(("context", "prefix"), [(17, 0), (16, 8), (17, 9), (30, 29)])
def test_as_many_sequences_run_at_once_as_were_planned(block_size, context, prefix):
    num_blocks = 160 // block_size
    shape = Shape(1, 1, 1)
    config = CacheConfig(num_blocks=num_blocks, block_size=block_size)
    found = plan_shape(shape, 4, config, Demand(context, prefix, requests=7))
    assert min(found.stages[-1].fit, 40) == admitted(num_blocks, block_size, context, prefix) > 2


def test_a_share_of_the_device_is_planned_as_the_blocks_that_it_gives():
    found = plan_shape(SMALL, 2, CacheConfig(memory="1%"), Demand(320))
    assert found.bytes_given == found.bytes_reserved == found.num_blocks * found.bytes_per_block > 0


def test_requests_take_the_shared_prefix_once():
    config = CacheConfig(memory="1GiB")
    found = plan_shape(SMALL, 2, config, Demand(320, 160, requests=10))
    cut, shared = found.stages[1:]
    assert cut.bytes_of_requests == 10 * 10 * found.bytes_per_block
    assert shared.bytes_of_requests == (5 + 10 * 5) * found.bytes_per_block
    assert "fit at once" in plan_lines(found)[1]
    crowded = plan_shape(SMALL, 2, CacheConfig(num_blocks=20), Demand(320, requests=10))
    assert "do not fit at once: 2 run" in plan_lines(crowded)[1]


def test_windows_bound_what_a_sequence_holds():
    engine = CacheConfig(memory="1GiB", block_size=16)
    whole, windowed = plan_shape(Shape(2, 1, 8, window=64), 2, engine, Demand(1000)).stages[1:]
    assert whole.bytes_of_sequence == BlockPool(1, 16).blocks_for(1000) * 16 * whole.bytes_per_token
    assert windowed.bytes_of_sequence <= (64 // 16 + 1) * 16 * whole.bytes_per_token


@pytest.mark.slow
def test_a_model_is_planned_by_what_its_passes_find():
    torch.manual_seed(0)
    sizes = dict(d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24)
    model = PyDecoder(PyDecoderConfig(vocab_size=40, **sizes)).eval()
    found = plan_model(model, CacheConfig(memory="1MiB", dtype="int8", block_size=8), Demand(40))
    assert [stage.name for stage in found.stages][1:] == ["the narrowest cut", "stored as int8"]
    rows = [2 * 2 * 4, 2 * 2 * 2, 2 * 2 * 2]  # layers, keys and values, heads
    widths = [8 * 4, 8 * 4, 8 + 4]  # float32, and codes with a scale
    assert [stage.bytes_per_token for stage in found.stages] == [r * w for r, w in zip(rows, widths, strict=True)]


def test_a_context_that_a_model_cannot_hold_is_refused():
    plan = CachePlan((), 16, 40, max_length=64, max_length_reason="position table of 64 rows")
    with pytest.raises(InputError, match=r"proven for, 64 \(position table of 64 rows\): ask for a shorter"):
        plan_memory(100, plan, plan, CacheConfig(), Demand(65))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which model: --model, or --layers, --kv-heads and --head-dim"),
        (["--model", "pydecoder", "--layers", "3"], "say which model"),
        (["--layers", "3"], "needs all of --layers, --kv-heads and --head-dim"),
        (["--layers", "1", "--kv-heads", "3", "--head-dim", "8", "--query-heads", "4"], "cannot share 3 KV heads"),
        (["--layers", "1", "--kv-heads", "1", "--head-dim", "8", "--bytes", "3"], "numbers of 3 bytes"),
        (["--layers", "1", "--kv-heads", "1", "--head-dim", "8", "--shared-prefix", "5000"], "does not fit a context"),
        (["--layers", "1", "--kv-heads", "1", "--head-dim", "8", "--window-layers", "1"], "need a window"),
        (["--layers", "1", "--kv-heads", "1", "--head-dim", "7", "--dtype", "int4"], "even head dim"),
        (["--layers", "9", "--kv-heads", "9", "--head-dim", "999999"], "holds no block"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, message):
    result = CliRunner().invoke(app, ["plan", "--memory", "1MiB", "--context", "100", *arguments])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr


def test_the_command_prints_a_table_or_json():
    shape = ["--layers", "32", "--kv-heads", "8", "--head-dim", "128"]
    arguments = ["plan", *shape, "--memory", "80GiB", "--context", "32768", "--dtype", "int4"]
    result = CliRunner().invoke(app, [*arguments, "--shared-prefix", "2000", "--requests", "1000", "--json"])
    data = json.loads(result.stdout)
    assert [stage["fit"] for stage in data["stages"]] == [20, 20, 75, 80]
    table = CliRunner().invoke(app, arguments).stdout
    assert "34 KiB" in table and "34816 bytes per token" in table


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 B"), (131072, "128 KiB"), (2**30, "1 GiB"), (3 * 2**29, "1.5 GiB")]
)
def test_bytes_are_written_in_units(count, text):
    assert bytes_text(count) == text
