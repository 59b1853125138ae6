"""The house rules of :mod:`tests.house_rules`, read from the tree.

The first half of the tests holds kvpass to an empty list of complaints; the second half plants a fault and asks for the
complaint, so that no rule can pass by being blind.
"""

from pathlib import Path

import pytest

from tests.house_rules import (
    MAX_FILES,
    MAX_LINES,
    ROOMS,
    RULES,
    crowded_rooms,
    import_faults,
    link_faults,
    long_files,
    model_name_faults,
    model_names,
    order_faults,
    package_faults,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule):
    assert rule(ROOT) == []


@pytest.fixture
def house(tmp_path):
    """A small tree in which every rule is content."""
    write(tmp_path, "kvpass/__init__.py")
    for room in ROOMS:
        write(tmp_path, f"{room}/first.py", "import torch\n")
        (tmp_path / "kvpass" / room).symlink_to(f"../{room}")
    write(tmp_path, "models/weights/config.json", "{}")
    write(tmp_path, "pyproject.toml", setuptools_table())
    return tmp_path


def setuptools_table(packages=("kvpass", *(f"kvpass.{room}" for room in ROOMS)), fx_passes="fx_passes"):
    mapping = {"kvpass": "kvpass", **{f"kvpass.{room}": room for room in ROOMS}, "kvpass.fx_passes": fx_passes}
    return "\n".join(
        [
            "[tool.setuptools]",
            f"packages = {list(packages)}",
            "[tool.setuptools.package-dir]",
            *(f'"{package}" = "{folder}"' for package, folder in mapping.items()),
            "[tool.setuptools.package-data]",
            '"kvpass.models" = ["weights/*"]\n',
        ]
    )


def write(root, path, text=""):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_right_house_has_no_faults(rule, house):
    write(house, ".venv/lib/kernels/x.py", "import kernels\n" * 500)
    write(house, "build/lib/x.py", "import kernels\n" * 500)
    assert rule(house) == []


PERMITTED = {
    "fx_passes/x.py": "from kvpass import types, errors\nfrom kvpass.kernels import ops\nimport kvpass.fx_passes.y",
    "kernels/sub/x.py": "from kvpass.config import Config\nfrom kvpass.kernels.sub import y\nimport kernelspec",
    "runtime/x.py": "from kvpass.kernels.formats.cache_formats import FORMATS\nimport numpy, runtimes",
    "models/x.py": "from kvpass.models.y import Decoder\nfrom transformers.models import llama",
    "kvpass/x.py": "import kvpass.runtime.pool\nfrom kvpass import kernels, models",
    "kvpass/types.py": "from kvpass.errors import KvpassError",
    "tests/x.py": "from kvpass.models import pydecoder",
}


@pytest.mark.parametrize("path", PERMITTED)
def test_a_permitted_import_is_no_fault(path, house):
    write(house, path, PERMITTED[path])
    assert import_faults(house) == []


FORBIDDEN = [
    ("fx_passes/x.py", "import kvpass.runtime.pool", "kvpass.runtime.pool"),
    ("fx_passes/x.py", "from kvpass import runtime", "kvpass.runtime"),
    ("fx_passes/x.py", "from kvpass.kernels import ops, triton", "kvpass.kernels.triton"),
    ("fx_passes/x.py", "from kvpass.kernels.opsy import f", "kvpass.kernels.opsy"),
    ("fx_passes/x.py", "import kvpass", "kvpass"),
    ("fx_passes/x.py", "def f():\n    from kvpass.report import R", "kvpass.report"),
    ("fx_passes/x.py", "import importlib\nimportlib.import_module('kvpass.runtime')", "kvpass.runtime"),
    ("fx_passes/sub/x.py", "from kvpass.models import pydecoder", "kvpass.models"),
    ("kernels/x.py", "from kvpass.fx_passes.find import find", "kvpass.fx_passes"),
    ("kernels/x.py", "from kvpass.models.pydecoder import PyDecoder", "kvpass.models"),
    ("runtime/x.py", "from kvpass.fx_passes import find", "kvpass.fx_passes"),
    ("runtime/x.py", "from kvpass.kernels import ops", "kvpass.kernels.ops"),
    ("runtime/x.py", "from kvpass import *", "kvpass.*"),
    ("models/x.py", "from kvpass.types import Shape", "kvpass.types"),
    ("kvpass/types.py", "from kvpass.runtime.pool import Pool", "kvpass.runtime"),
    ("kvpass/errors.py", "from kvpass.compiler import compile", "kvpass.compiler"),
    ("kvpass/x.py", "from . import types", "relative import of .types"),
    ("kvpass/x.py", "from ..kernels.ops import f", "relative import of ..kernels.ops.f"),
    ("tests/x.py", "from kernels.ops import f", "bare import of kernels"),
    ("benchmarks/x.py", "import models", "bare import of models"),
]


@pytest.mark.parametrize(("path", "source", "complaint"), FORBIDDEN)
def test_a_forbidden_import_is_found(path, source, complaint, house):
    write(house, path, source)
    (fault,) = import_faults(house)
    assert fault.startswith(f"{path}:") and complaint in fault


@pytest.mark.parametrize(
    "text",
    [
        "a gpt2 graph",
        "GPT-J",
        "llama_rope(q)",
        "class LlamaAttention:",
        "HFDeepSeekV3",
        "import transformers",
        "BLOOM's",
        "# as Qwen3 does",
        "is_gemma = 1",
        "GPTNeo",
    ],
)
def test_a_model_name_in_a_pass_is_found(text, house):
    write(house, "fx_passes/x.py", f"\n# {text}\n")
    (fault,) = model_name_faults(house)
    assert fault.startswith("fx_passes/x.py:2:")


@pytest.mark.parametrize("text", ["gemm", "a transformer", "bloomed", "egpts", "Transform", "falconry"])
def test_a_word_that_only_resembles_a_model_name_is_not(text):
    assert model_names(text) == []


def test_a_pass_named_after_a_model_is_found(house):
    write(house, "fx_passes/llama_rope.py")
    assert model_name_faults(house) == ["fx_passes/llama_rope.py:name: llama_rope"]


@pytest.mark.parametrize("path", ["kvpass/x.py", "kernels/cpu/x.cpp", "kernels/cpu/x.h", "tests/x.py", "x.py"])
def test_a_long_file_is_found(path, house):
    write(house, path, "\n" * MAX_LINES)
    assert long_files(house) == []
    write(house, path, "\n" * (MAX_LINES + 1))
    assert long_files(house) == [f"{path} has 401 lines, more than 400"]


def test_faults_of_links_are_found(house):
    write(house, "runtime/__init__.py")
    (house / "kvpass/models").unlink()
    (house / "kvpass/kernels").unlink()
    (house / "kvpass/kernels").symlink_to(house / "kernels")
    (house / "kvpass/__init__.py").unlink()
    faults = "\n".join(link_faults(house))
    assert len(link_faults(house)) == 4
    for complaint in (
        "kvpass/models is no symbolic link",
        "kvpass/kernels points to /",
        "runtime/__init__",
        "is missing",
    ):
        assert complaint in faults


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("fx_passes/capture/x.py", "from kvpass.fx_passes.masks.y import f", "capture may not import from masks"),
        ("fx_passes/x.py", "import kvpass.fx_passes.masks.y", "fx_passes may not import from masks"),
        ("fx_passes/capture/x.py", "from kvpass.fx_passes.stages import f", "capture may not import from stages.py"),
        ("fx_passes/new/x.py", "", "has no place in the order"),
        ("kvpass/reports/x.py", "def f():\n    from kvpass.cli import y", "reports may not import from cli"),
        ("kvpass/x.py", "from kvpass.engine.engine import Engine", "kvpass may not import from engine"),
    ],
)
def test_an_import_against_the_order_is_found(path, source, complaint, house):
    for there in ("fx_passes/masks/y.py", "fx_passes/stages.py", "kvpass/cli/y.py", "kvpass/engine/engine.py"):
        write(house, there)
    assert order_faults(house) == []
    write(house, path, source)
    (fault,) = order_faults(house)
    assert fault.startswith(path) and complaint in fault


def test_a_crowded_room_is_found(house):
    for i in range(MAX_FILES):
        write(house, f"runtime/pool/x{i}.py")
    assert crowded_rooms(house) == []
    write(house, "runtime/pool/one_more.py")
    assert crowded_rooms(house) == [f"runtime/pool has {MAX_FILES + 1} files, more than {MAX_FILES}"]


PACKAGES = ("kvpass", *(f"kvpass.{room}" for room in ROOMS))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kernels/cpu/x.py": ""}, "kvpass.kernels.cpu is not listed in packages"),
        ({"kvpass/export/x.py": ""}, "kvpass.export is not listed in packages"),
        ({"models/more/x.json": ""}, "models/more/x.json is in no package-data and would not ship"),
        ({"kernels/table.txt": ""}, "kernels/table.txt is in no package-data and would not ship"),
        ({"pyproject.toml": setuptools_table(PACKAGES[1:])}, "kvpass is not listed in packages"),
        ({"pyproject.toml": setuptools_table((*PACKAGES, "kvpass.gone"))}, "kvpass.gone is listed in packages"),
        ({"pyproject.toml": setuptools_table(fx_passes="kvpass/fx_passes")}, "package-dir maps kvpass.fx_passes to"),
    ],
)
def test_faults_of_packages_are_found(changes, complaint, house):
    for path, text in changes.items():
        write(house, path, text)
    (fault,) = package_faults(house)
    assert fault.startswith(complaint)
