"""A decoder leaves the library as a folder whose file gives the logits of the rewritten model, or not at all."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kvpass
from kvpass.exporters import export_module as export_room
from kvpass.exporters.formats import FORMATS
from tests.decoders.catalogue import DECODERS

SOURCES = str(Path(__file__).resolve().parents[1]).encode()  # a package of AOTInductor may name where torch lies
CONFIG = kvpass.CacheConfig(block_size=8, num_blocks=1)
# Each holds what an exporter may lose: a window, a latent row that is key and value at once, sinks.
MODELS = ("window by distance, float mask", "latent by einsum, low-rank queries", "sinks as gates")

AUDITED = [
    pytest.param(name, marks=pytest.mark.skipif(not all(map(find_spec, form.needs)), reason="not installed"))
    for name, form in FORMATS.items()
]
# What an audit runs by other parts than the example needs a GPU.
EXAMPLES = [pytest.param(name, marks=pytest.mark.gpu) if form.players else name for name, form in FORMATS.items()]


def options(format: str) -> dict[str, Any]:
    return {"context": 96} if FORMATS[format].is_static else {}


def files_of(folder: Path) -> list[Path]:
    """The files in a folder, with those that lie packed in one."""
    for entry in list(folder.glob("*.pt2")):
        with zipfile.ZipFile(entry) as packed:
            packed.extractall(folder / "packed")
    return [entry for entry in folder.rglob("*") if entry.is_file()]


@pytest.mark.sampled(24, 6)
@pytest.mark.parametrize("format", AUDITED)
@pytest.mark.parametrize("name", MODELS)
def test_the_file_gives_the_logits_of_the_model(
    name: str, format: str, engines: Callable[[str], kvpass.Engine], tmp_path: Path
) -> None:
    engine = engines(name)
    if FORMATS[format].refusals(engine.module):
        pytest.skip("refused by name")
    result = engine.export(tmp_path / "out", format, **options(format))
    assert result.audit is not None and result.audit.rows >= 20
    assert set(result.files) >= {"manifest.json", "probe.json", "run.py"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]  # nothing is left of where it was made
    assert not [entry.name for entry in files_of(tmp_path / "out") if SOURCES in entry.read_bytes()]


@pytest.mark.sampled(9, 3)
@pytest.mark.parametrize("format", EXAMPLES)
def test_the_example_says_the_tokens_of_the_original(
    format: str, engines: Callable[[str], kvpass.Engine], tmp_path: Path
) -> None:
    name = MODELS[0]
    if FORMATS[format].refusals(engines(name).module):
        pytest.skip("refused by name")
    engines(name).export(tmp_path / "out", format, audit=False, **options(format))
    prompts = [[3, 5, 7, 11, 13, 17, 19, 23, 29], [4, 6]]
    command = [sys.executable, str(tmp_path / "out" / "run.py"), *(",".join(map(str, prompt)) for prompt in prompts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [[int(token) for token in line.split(",")] for line in done.stdout.split()]
    assert found == [greedy(DECODERS[name](6), prompt, 16) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_package_runs_without_python(engines: Callable[[str], kvpass.Engine], tmp_path: Path) -> None:
    engines(MODELS[0]).export(tmp_path / "out", "aoti", audit=False)
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    build = ["g++", "-O1", "-std=c++20", "run.cpp", "-o", "run", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    build += [f"-L{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder}/lib"]
    done = subprocess.run(build, cwd=tmp_path / "out", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    prompt = [3, 5, 7, 11, 13, 17, 19, 23, 29]
    command = ["./run", "model.pt2", "12", *map(str, prompt)]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(token) for token in done.stdout.split(",")] == greedy(DECODERS[MODELS[0]](6), prompt, 12)


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, by the model as it was written."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def for_genai(engines: Callable[[str], kvpass.Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai") / "out"
    engines(MODELS[0]).export(folder, "ort-genai", audit=False)
    return folder


def test_genai_generates_the_tokens_of_the_original(for_genai: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model, prompt = genai.Model(str(for_genai)), [3, 5, 7, 11, 13, 17, 19, 23, 29]
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 12, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[len(prompt) :].tolist() == greedy(DECODERS[MODELS[0]](6), prompt, 12)


def test_rows_of_a_padded_batch_do_not_see_the_padding(for_genai: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(for_genai / "model.onnx"))
    caches = {
        port.name: np.zeros(
            [2 if size == "batch" else 0 if size == "past" else size for size in port.shape], np.float32
        )
        for port in session.get_inputs()[2:]
    }
    long, short = [3, 5, 7, 11, 13, 17, 19, 23, 29], [4, 6]
    padding = len(long) - len(short)
    mask = np.ones((2, len(long)), np.int64)
    mask[1, :padding] = 0
    ids = np.array([long, [0] * padding + short], np.int64)
    rows = [list(long), list(short)]
    for _ in range(4):
        logits, *caches_after = session.run(None, {"input_ids": ids, "attention_mask": mask, **caches})
        caches = dict(zip(caches, caches_after, strict=True))
        tokens = logits[:, 0].argmax(-1)
        assert tokens.tolist() == [greedy(DECODERS[MODELS[0]](6), row, 1)[0] for row in rows]
        for row, token in zip(rows, tokens, strict=True):
            row.append(int(token))
        ids, mask = tokens[:, None], np.concatenate((mask, np.ones((2, 1), np.int64)), 1)


def test_caches_of_different_shapes_are_refused_for_genai(
    engines: Callable[[str], kvpass.Engine], tmp_path: Path
) -> None:
    words = "ort-genai cannot express caches of different shapes; format pt2"
    with pytest.raises(kvpass.RefusedError, match=words):
        engines(MODELS[1]).export(tmp_path / "out", "ort-genai")


@pytest.fixture(scope="module")
def exported(engines: Callable[[str], kvpass.Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    engines(MODELS[0]).export(folder, "pt2", audit=False)
    return folder


def copied(exported: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def cut_short(folder: Path) -> None:
    file = folder / "model.pt2"
    file.write_bytes(file.read_bytes()[:-100])


def edit(folder: Path) -> None:
    file = folder / "run.py"
    file.write_text(file.read_text().replace("argmax", "argmin"))


def lose(folder: Path) -> None:
    (folder / "probe.json").unlink()


def age(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "kvpass": "0.0.1"}))


def empty(folder: Path) -> None:
    (folder / "manifest.json").write_text("")


DAMAGE = {
    "cut short": (cut_short, r"has \d+ bytes instead of \d+: it was cut short or changed"),
    "edited": (edit, r"run\.py was changed since it was exported"),
    "lost": (lose, r"has no file probe\.json"),
    "of another version": (age, r"was exported by kvpass 0\.0\.1"),
    "without a manifest": (empty, r"holds no export of kvpass that can be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused(kind: str, exported: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    folder = copied(exported, tmp_path / "out")
    damage(folder)
    with pytest.raises(kvpass.InputError, match=message):
        kvpass.audit(folder)


def test_bad_input_is_refused_and_leaves_nothing(engines: Callable[[str], kvpass.Engine], tmp_path: Path) -> None:
    engine = engines(MODELS[0])
    (tmp_path / "there").mkdir()
    with pytest.raises(kvpass.ConfigError, match="there is no format 'gguf': choose one of pt2, aoti"):
        engine.export(tmp_path / "out", "gguf")
    with pytest.raises(kvpass.InputError, match="exists already"):
        engine.export(tmp_path / "there")
    with pytest.raises(kvpass.InputError, match="is no folder that can be written to"):
        engine.export(tmp_path / "nowhere" / "out")
    with pytest.raises(kvpass.ConfigError, match="no number of tokens from 32 on"):
        engine.export(tmp_path / "out", "onnx", context=0)
    with pytest.raises(kvpass.ConfigError, match="has no context of its own"):
        engine.export(tmp_path / "out", "pt2", context=64)
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


def test_a_context_beyond_the_proof_is_refused(tmp_path: Path) -> None:
    with kvpass.compile(DECODERS["position table with an offset"](6), CONFIG) as engine:
        longest = engine.plan.max_length
        assert longest is not None
        with pytest.raises(kvpass.ConfigError, match=f"more than the model is proven for, {longest} tokens"):
            engine.export(tmp_path / "out", "onnx", context=longest + 1)


def test_what_a_format_cannot_say_is_refused_with_those_that_can(tmp_path: Path) -> None:
    config = kvpass.CacheConfig(block_size=8, num_blocks=1, dtype="fp8_e4m3")
    with kvpass.compile(DECODERS[MODELS[0]](6), config, verify=False) as engine:
        message = r"format onnx cannot express a cache in fp8_e4m3; format pt2 or aoti can\. Nothing was written"
        with pytest.raises(kvpass.RefusedError, match=message) as caught:
            engine.export(tmp_path / "out", "onnx")
        assert {refusal.pass_name for refusal in caught.value.report.refusals} == {"export"}
    assert not list(tmp_path.iterdir())


def test_numbers_that_onnx_runtime_has_no_kernels_for_are_refused(tmp_path: Path) -> None:
    with kvpass.compile(DECODERS[MODELS[0]](6).bfloat16(), CONFIG, verify=False) as engine:
        words = r"onnx-paged cannot express a model that computes in bfloat16; format pt2 or aoti can\."
        with pytest.raises(kvpass.RefusedError, match=words):
            engine.export(tmp_path / "out", "onnx-paged")


def test_a_missing_package_is_named_with_its_command(
    engines: Callable[[str], kvpass.Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpass.exporters.extras.find_spec", lambda name: None)
    with pytest.raises(kvpass.InputError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'kvpass\[onnx\]'"):
        engines(MODELS[0]).export(tmp_path / "out", "onnx")
    monkeypatch.setattr("kvpass.exporters.extras.installed", lambda name: "1.0")
    with pytest.raises(kvpass.InputError, match="are both installed, and overwrite each other's files"):
        engines(MODELS[0]).export(tmp_path / "out", "onnx")


def test_what_a_translator_gives_up_on_is_refused(
    engines: Callable[[str], kvpass.Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: object) -> None:
        raise NotImplementedError("no word for aten::mystery")

    monkeypatch.setattr("kvpass.exporters.formats.export_step", give_up)
    words = r"could not be translated to format onnx, .*: no word for aten::mystery"
    with pytest.raises(kvpass.RefusedError, match=words):
        engines(MODELS[0]).export(tmp_path / "out", "onnx", context=96)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(
    engines: Callable[[str], kvpass.Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_room, "write_manifest", no_space)
    with pytest.raises(kvpass.InputError, match=r"could not be written, and nothing is left of it: .*No space left"):
        engines(MODELS[0]).export(tmp_path / "out", "pt2", audit=False)
    assert not list(tmp_path.iterdir())
