"""The house rules, read from the tree: links, packages, file sizes, and which room may import which.

Every rule is a function from a tree (or a source) to a list of complaints. The first half of the tests holds kvpass to
an empty list; the second half plants a fault and asks for the complaint, so that no rule can pass by being blind.
"""

import ast
import fnmatch
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("fx_passes", "kernels", "models", "runtime")
MAX_LINES = 400
SOURCES = {".py", ".cpp", ".cc", ".c", ".h", ".hpp", ".cu", ".cuh"}
NOT_OURS = {"build", "dist", "__pycache__", "venv"}
BUILT = {".pyc", ".so", ".dylib", ".pyd", ".o"}

SHARED = ("kvpass.types", "kvpass.config", "kvpass.errors")
FORMATS = ("kvpass.kernels.formats", "kvpass.kernels.settling")
# What a room may import of kvpass; a name stands for itself and all below it. Other packages are free.
MAY_IMPORT = {
    "fx_passes": (*SHARED, "kvpass.fx_passes", "kvpass.kernels.ops", *FORMATS),
    "kernels": (*SHARED, "kvpass.kernels"),
    "models": ("kvpass.models",),
    "runtime": (*SHARED, "kvpass.runtime", *FORMATS),
}
# The rooms meet in the shared modules, which therefore know of no room: else one could reach another through them.
SHARED_FILES = ("kvpass/types.py", "kvpass/config.py", "kvpass/errors.py", "kvpass/report.py")
SHARED_MAY_IMPORT = (*SHARED, "kvpass.report")

# A pass goes by what the graph means, so no pass knows a model by name: as a word in any case (gpt2, GPT-J,
# llama_rope), or as the head of a CamelCase name (LlamaAttention, HFGPTNeo).
FAMILIES = "llama gpt qwen deepseek mistral gemma bloom falcon transformers"
AS_WORD = re.compile(rf"(?<![a-z])(?:{FAMILIES.replace(' ', '|')})(?![a-z])", re.IGNORECASE)
AS_CAMEL = re.compile(rf"(?:{FAMILIES.title().replace(' ', '|')}|DeepSeek|GPT)(?![a-z])")


def files(root: Path, under: str = ".") -> Iterator[Path]:
    """Regular files below `under` that are the project's own, relative to `root`; links are not followed."""
    for folder, subfolders, names in os.walk(root / under):
        subfolders[:] = [
            name for name in subfolders if name not in NOT_OURS and name[0] != "." and not name.endswith(".egg-info")
        ]
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink() and path.suffix not in BUILT and name[0] != ".":
                yield path.relative_to(root)


def python_files(root: Path, under: str = ".") -> list[Path]:
    return sorted(path for path in files(root, under) if path.suffix == ".py")


def imported(source: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, names) of each import; it keeps to a list of modules if any one of `names` is in the list.

    `from a import b` may mean module a or module a.b, and is given as both. A relative import begins with a dot.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, (alias.name,)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, (module, f"{module}.{alias.name}" if node.module else module + alias.name)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(name, ast.Constant):
                yield node.lineno, (str(name.value),)


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def wrong_imports(source: str, permitted: tuple[str, ...] | None) -> list[str]:
    """Imports that break the rules, where `permitted` is what may be imported of kvpass (None: all of it)."""
    found = []
    for line, names in imported(source):
        if names[0].startswith("."):
            found.append(f"{line}: relative import of {names[-1]}")
        elif within(names[0], ROOMS):
            found.append(f"{line}: bare import of {names[0]}, write kvpass.{names[0]}")
        elif (
            permitted is not None
            and within(names[0], ("kvpass",))
            and not any(within(name, permitted) for name in names)
        ):
            found.append(f"{line}: {names[-1]} may not be imported here")
    return found


def import_faults(root: Path) -> list[str]:
    faults = []
    for path in python_files(root):
        permitted = SHARED_MAY_IMPORT if path.as_posix() in SHARED_FILES else MAY_IMPORT.get(path.parts[0])
        faults += [f"{path}:{fault}" for fault in wrong_imports((root / path).read_text(), permitted)]
    return faults


def link_faults(root: Path) -> list[str]:
    faults = []
    for room in ROOMS:
        link = root / "kvpass" / room
        if not link.is_symlink():
            faults.append(f"kvpass/{room} is no symbolic link (was git told core.symlinks=false?)")
        elif os.readlink(link) != f"../{room}":
            faults.append(f"kvpass/{room} points to {os.readlink(link)}, not to ../{room}")
        if not (root / room).is_dir():
            faults.append(f"{room} is no folder")
        if (root / room / "__init__.py").exists():
            faults.append(f"{room}/__init__.py makes a top-level {room} importable")
    if not (root / "kvpass" / "__init__.py").is_file():
        faults.append("kvpass/__init__.py is missing")
    return faults


def package_faults(root: Path) -> list[str]:
    """Where `[tool.setuptools]` and the tree differ: folders that are not listed, data that would not ship."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed, mapping, data = set(settings["packages"]), settings["package-dir"], settings.get("package-data", {})
    faults = [
        f"package-dir maps {package} to {mapping.get(package)}, not to {folder}"
        for package, folder in {"kvpass": "kvpass", **{f"kvpass.{room}": room for room in ROOMS}}.items()
        if mapping.get(package) != folder
    ]
    there = {"kvpass", *(f"kvpass.{room}" for room in ROOMS)}
    for path in [path for top in ("kvpass", *ROOMS) for path in files(root, top)]:
        package = ".".join(path.parent.parts if path.parts[0] == "kvpass" else ("kvpass", *path.parent.parts))
        if path.suffix == ".py" or package in listed:
            there.add(package)
        if path.suffix not in SOURCES and not ships_as_data(package, path.name, data):
            faults.append(f"{path} is in no package-data and would not ship")
    faults += [f"{package} is not listed in packages" for package in sorted(there - listed)]
    faults += [f"{package} is listed in packages but is not there" for package in sorted(listed - there)]
    return faults


def ships_as_data(package: str, name: str, data: dict[str, list[str]]) -> bool:
    """Whether a pattern of the file's package, or of a package above it, covers it."""
    below = name
    while package:
        if any(
            fnmatch.fnmatch(below, pattern) and below.count("/") == pattern.count("/")
            for pattern in data.get(package, [])
        ):
            return True
        package, _, folder = package.rpartition(".")
        below = f"{folder}/{below}"
    return False


def long_files(root: Path) -> list[str]:
    counts = {path: len((root / path).read_text().splitlines()) for path in files(root) if path.suffix in SOURCES}
    return [f"{path} has {lines} lines, more than {MAX_LINES}" for path, lines in counts.items() if lines > MAX_LINES]


def model_names(text: str) -> list[str]:
    """Names of model families in a source; whatever a pass needs of a model it must find in the graph."""
    return [
        f"{number}: {found.group()}"
        for number, line in enumerate(text.splitlines(), 1)
        if (found := AS_WORD.search(line) or AS_CAMEL.search(line))
    ]


def model_name_faults(root: Path) -> list[str]:
    return [
        f"{path}:{fault}"
        for path in python_files(root, "fx_passes")
        for fault in [f"name: {path.stem}" for _ in model_names(path.stem)] + model_names((root / path).read_text())
    ]


RULES = [import_faults, link_faults, long_files, model_name_faults, package_faults]


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
    "runtime/x.py": "from kvpass.kernels.formats import FORMATS\nimport numpy, runtimes",
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
