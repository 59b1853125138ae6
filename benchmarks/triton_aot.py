"""Compile every Triton kernel and tuned tile ahead of time, with no GPU, and see that nothing spills.

    python benchmarks/triton_aot.py --output benchmarks/results/triton_aot.json --table docs/triton-resources.md
    python benchmarks/triton_aot.py --targets sm_90 --quick
    python benchmarks/triton_aot.py --targets sm_90 --control     # kernels that do spill: must exit with 1

A kernel passes if it keeps everything in registers (a stack of 0 bytes; no vector register spilled on gfx942), and if
as many programs as its tile asks for fit a multiprocessor's registers and shared memory.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvpass.kernels.formats.cache_formats import FORMATS
from kvpass.kernels.triton_kernels.launch import attention_call, cache_calls
from kvpass.kernels.triton_kernels.launch.attention_call import AttentionCall, Features
from kvpass.kernels.triton_kernels.launch.launch import ARCHITECTURES, Launch, Target
from kvpass.kernels.triton_kernels.launch.stored import see_cache, see_for_write
from kvpass.kernels.triton_kernels.launch.tuning import Tile

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
REGISTERS = 64 << 10  # of a multiprocessor; gfx942 has 512 for each lane of its 4 x 64 lanes
Q_HEADS, HEADS, SEQUENCES = 32, 8, 64
ALL_FEATURES = ("softcap", "window", "slopes", "sinks", "bias", "chunk")


class Case(NamedTuple):
    """What a launch was made for."""

    op: str
    form: str = "bfloat16"
    width: int = 128
    rows: int = 16
    block_size: int = 16
    features: str = ""


def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def make_cache(case: Case, heads: int = HEADS, values: bool = False) -> Tensor:
    form = FORMATS["v2" if values and case.form == "k4" else case.form]
    return empty(999, heads, case.block_size, form.stored_width(case.width), dtype=form.dtype)


def make_call(case: Case, target: Target) -> AttentionCall:
    """An attention call whose tile has the case's rows."""
    latent = case.op == "latent"
    heads, group = (1, 16 if case.rows == 16 else 64) if latent else (HEADS, Q_HEADS // HEADS)
    tokens = SEQUENCES * (1 if case.rows == 16 or latent else 512)
    dtype = FORMATS[case.form].dtype if FORMATS[case.form].bits > 8 else torch.bfloat16
    keys = see_cache(make_cache(case, heads), case.form, target)
    features, value_form = Features(), case.form.replace("k4", "v2")
    if case.features:
        made: dict[str, Any] = {
            "softcap": 30.0, "window": 4096, "chunk": 8192, "slopes": empty(heads * group, dtype=torch.float32),
            "sinks": empty(heads * group, dtype=torch.bfloat16), "bias": empty(1, 999, 999, dtype=torch.bfloat16),
            "tree_mask": empty(tokens, 32, dtype=torch.bool),
        }  # fmt: skip
        features = Features(**{name: made[name] for name in case.features.split("+")})
    return AttentionCall(
        query=empty(tokens, heads * group, case.width, dtype=dtype), keys=keys, values=keys if latent else
        see_cache(make_cache(case, heads, True), value_form, target), value_dim=512 if latent else case.width,
        block_tables=empty(SEQUENCES, 512), seq_lens=empty(SEQUENCES), query_start=empty(SEQUENCES + 1), scale=0.1,
        features=features, shared=(empty(9), empty(8)) if case.op == "cascade" else None,
    )  # fmt: skip


def attention_cases(quick: bool) -> Iterator[Case]:
    if quick:
        yield from (Case("paged", "bfloat16"), Case("write", "int8"))
        return
    for form in ("bfloat16", "int8", "int4", "fp8_e4m3"):  # float16 and fp8_e5m2 have the same tiles
        for rows in (16, 64):
            yield from (Case("paged", form, width, rows) for width in (128, 64, 256))
            yield Case("paged", form, 128, rows, 64)
            if form != "fp8_e4m3":
                yield Case("paged", form, 128, rows, 16, "+".join(ALL_FEATURES))
        yield Case("latent", form, 576, 16, 64)
    yield from (Case("paged", "float32", width, rows) for width, rows in ((64, 16), (128, 16), (64, 64)))
    yield from (Case("paged", form) for form in ("float16", "fp8_e5m2"))
    yield Case("paged", "bfloat16", 128, 64, 16, "tree_mask")
    yield Case("paged", "bfloat16", 96, 16, 16)
    yield Case("cascade", "bfloat16", 128, 16, 16)
    for width, rows in ((64, 16), (128, 16), (64, 64)):
        yield from (Case("paged", "k4", width, rows, size) for size in (16, 64))
    yield Case("paged", "k4", 128, 16, 32, "+".join(ALL_FEATURES))
    yield from (Case(op, "k4") for op in ("mass", "gather"))
    yield Case("gather", "v2")
    yield from (Case("settle", form, 128, 16, size) for form in ("k4", "v2") for size in (16, 64))
    for form in (name for name, row in FORMATS.items() if row.settles is None):
        yield from (Case(op, form) for op in ("mass", "write", "fused", "gather"))
    yield from (Case("write", "int8", 576), Case("fused", "int4", 256), Case("copy"))


def launches_of(case: Case, target: Target) -> list[Launch]:
    """The launches of a case, as the backend would make them."""
    if case.op in ("paged", "latent", "cascade", "mass"):
        call = make_call(case, target)
        out = empty(*call.query.shape[:2], call.value_dim, dtype=call.query.dtype)
        lse = empty(*out.shape[:2], dtype=torch.float32)
        positions = empty(out.shape[0], dtype=torch.int32)
        if case.op == "cascade":
            return attention_call.lay_out_cascade(call, out, target)
        if case.op == "mass":
            mass = empty(SEQUENCES, HEADS, 512 * 16, dtype=torch.float32)
            return [attention_call.lay_out_mass(call, lse, mass, target)]
        tree = "tree_mask" in case.features
        first = [attention_call.find_positions(call)[1]] if tree else []
        return first + attention_call.lay_out_attention(call, out, None, target, positions if tree else None)
    cache = make_cache(case)
    if case.op == "copy":
        return cache_calls.lay_out_copy(cache, empty(9), empty(9))
    if case.op == "settle":
        return cache_calls.lay_out_settle(see_cache(cache, case.form, target), empty(9), empty(9))
    if case.op == "gather":
        out = empty(SEQUENCES, 512 * 16, HEADS, case.width, dtype=torch.float32)
        return [cache_calls.lay_out_gather(see_cache(cache, case.form, target), empty(64, 512), empty(64), out)]
    stored = see_for_write(cache, case.form)
    rows, query = (empty(64, heads, case.width, dtype=torch.bfloat16) for heads in (HEADS, Q_HEADS))
    weight, angle = empty(case.width, dtype=torch.bfloat16), empty(64, case.width, dtype=torch.float32)
    rotation = cache_calls.Rotation(query, torch.empty_like(query), weight, weight, 1e-6, angle, angle, False)
    return [cache_calls.lay_out_write(rows, rows, stored, stored, empty(64), rotation if case.op == "fused" else None)]


def source_of(launch: Launch) -> ASTSource:
    """What Triton would compile for a launch: the types of its arguments, and which are constants or aligned."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], aligned[index,] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                aligned[index,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, aligned)


def compile_launch(launch: Launch, architecture: str) -> dict[str, int]:
    """Registers, spills, shared memory and instructions of a launch."""
    hip = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if hip else GPUTarget("cuda", int(architecture[3:]), 32)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source_of(launch), target=target, options=options)
    found = {"shared": int(compiled.metadata.shared)}
    if hip:
        text = compiled.asm["amdgcn"]
        numbers = {name: int(value) for name, value in re.findall(r"\.(vgpr\w*|agpr_count|sgpr\w*):\s+(\d+)", text)}
        found |= {"registers": numbers["vgpr_count"], "spilled": numbers["vgpr_spill_count"]}
        found["instructions"] = len(re.findall(r"^\t[a-z]+_\w+", text, re.MULTILINE))
        return found
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([folder / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *options in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    found |= {"registers": numbers["REG"], "spilled": numbers["STACK"] + numbers["LOCAL"]}
    found["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
    return found


def find_faults(found: dict[str, Any], architecture: str) -> list[str]:
    """What is wrong with a compiled launch."""
    faults = []
    if found["spilled"]:
        faults.append(f"spills {found['spilled']}")
    programs = found["programs"]
    if found["shared"] * programs > SHARED_BYTES[architecture]:
        faults.append(f"{programs} programs of {found['shared']} bytes of shared memory do not fit a multiprocessor")
    if not architecture.startswith("gfx") and found["registers"] * found["warps"] * 32 * programs > REGISTERS:
        faults.append(f"{programs} programs of {found['registers']} registers do not fit a multiprocessor")
    return faults


def check(case: Case, architecture: str, control: bool) -> list[dict[str, Any]]:
    """Compile the launches of one case; each as a row of the table."""
    target = Target(architecture, 100, native_fp8=architecture in ("sm_90", "sm_100"))
    chosen = mock.patch.object(attention_call, "choose_tile", return_value=Tile(64, 64, 1, 1, 1))
    with chosen if control else mock.patch.object(attention_call, "LEAST_UNITS", attention_call.LEAST_UNITS):
        launches = launches_of(case, target)
    rows = []
    for launch in launches:
        name = launch.kernel.fn.__name__
        fixed = name not in ("attention_kernel", "settled_attention_kernel")
        if fixed and case.op in ("paged", "latent") and case != Case("paged") and "tree" not in case.features:
            continue  # schedule and merge are the same for all of these
        began = time.time()
        found: dict[str, Any] = compile_launch(launch, architecture)
        found |= {"warps": launch.warps, "stages": launch.stages}
        found["keys"] = launch.arguments.get("BLOCK_N", 0)
        found["programs"] = 1 if fixed else launch.grid[0] // target.processors
        faults = find_faults(found, architecture)
        rows.append({"kernel": name, "target": architecture, **case._asdict(), **found, "faults": faults})
        took = f"{time.time() - began:.1f} s"
        print(architecture, name, *case, {k: found[k] for k in ("registers", "shared", "instructions")}, took, *faults)
        sys.stdout.flush()
    return rows


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """The attention kernel's tiles as a page: one line for each case, one column for each target."""
    cells: dict[tuple[str, ...], dict[str, str]] = collections.defaultdict(dict)
    for row in rows:
        if not row["kernel"].endswith("attention_kernel") or row["op"] == "cascade":
            continue
        features = row["features"].replace("+".join(ALL_FEATURES), "all").replace("_", " ")
        case = (row["op"], row["form"], *(str(row[name]) for name in ("width", "rows", "block_size")), features)
        tile = f"{row['keys']}/{row['warps']}/{row['stages']}/{row['programs']}"
        cells[case][row["target"]] = f"{tile}: {row['registers']}, {row['shared'] / 1024:.0f}, {row['instructions']}"
    targets = [name for name in ARCHITECTURES if any(name in found for found in cells.values())]
    lines = [
        "# Triton: what each tile takes",
        "",
        "Made by `python benchmarks/triton_aot.py`, with no GPU: nothing here is a time. A cell gives the tile's keys,",
        "warps, stages and programs per multiprocessor, then registers per thread, KiB of shared memory, and",
        "instructions. None of these spills; an empty cell has not been compiled. Every kernel, not only attention:",
        "`benchmarks/results/triton_aot.json`. See [the kernels](kernels-triton.md).",
        "",
        "| op | format | head dim | rows | block | features | " + " | ".join(targets) + " |",
        "| --- " * (6 + len(targets)) + "|",
    ]
    for case, found in cells.items():
        lines.append("| " + " | ".join((*case, *(found.get(target, "") for target in targets))) + " |")
    path.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--quick", action="store_true", help="five kernels only")
    parser.add_argument("--control", action="store_true", help="tiles that spill, to see that they are caught")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    cases = [Case("paged", "bfloat16", 64, 64)] if options.control else list(attention_cases(options.quick))
    rows: list[dict[str, Any]] = []
    for name in options.targets:
        for case in cases:
            rows += check(case, name, options.control)
            if options.output:
                write_results(rows, options.output)
    faults = [row for row in rows if row["faults"]]
    print(f"{len(rows)} kernels compiled, {len(faults)} with faults")
    for row in faults:
        print(row)
    if options.table:
        assert options.output is not None, "the table is made of what --output holds"
        write_table(json.loads(options.output.read_text())["kernels"], options.table)
    return 1 if faults else 0


def write_results(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows to a file, in the place of those of the same targets."""
    done = {row["target"] for row in rows}
    kept = json.loads(path.read_text())["kernels"] if path.exists() else []
    rows = sorted(
        [row for row in kept if row["target"] not in done] + rows, key=lambda r: ARCHITECTURES.index(r["target"])
    )
    head = {"torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%Y-%m-%d")}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(json.dumps(head)[:-1] + ', "kernels": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    sys.exit(main())
