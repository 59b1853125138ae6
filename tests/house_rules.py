"""The house rules: links, packages, file sizes, and which room may import which.

Every rule is a function from a tree (or a source) to a list of complaints; :mod:`tests.test_layout` holds kvpass to an
empty list, and plants faults to see that no rule is blind.
"""

import ast
import fnmatch
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOMS = ("fx_passes", "kernels", "models", "runtime")
MAX_LINES = 400
SOURCES = {".py", ".cpp", ".cc", ".c", ".h", ".hpp", ".cu", ".cuh"}
NOT_OURS = {"build", "dist", "__pycache__", "venv"}
BUILT = {".pyc", ".so", ".dylib", ".pyd", ".o"}

SHARED = ("kvpass.types", "kvpass.config", "kvpass.errors")
FORMATS = ("kvpass.kernels.formats.cache_formats", "kvpass.kernels.formats.settling")
# What a room may import of kvpass; a name stands for itself and all below it. Other packages are free.
MAY_IMPORT = {
    "fx_passes": (*SHARED, "kvpass.fx_passes", "kvpass.kernels.ops", *FORMATS),
    "kernels": (*SHARED, "kvpass.kernels"),
    "models": ("kvpass.models",),
    "runtime": (*SHARED, "kvpass.runtime", *FORMATS),
}
# The order of the rooms, the lowest first: a file imports from its own room and from those before it. "" stands for the
# files that lie in the room itself, but for those that have a place of their own.
ORDER = {
    "fx_passes": (
        "op_facts", "", "capture", "symbolic", "token_axis", "attention", "canonical", "masks", "planning",
        "optimization", "lowering", "validation", "dialects.py", "stages.py",
    ),
    "kernels": ("formats", "", "reference", "cpu", "triton_kernels/device", "triton_kernels/launch"),
    "runtime": ("", "pool", "tiers", "prefix", "sequences", "sampling", "speculation", "schedule"),
    "kvpass": (
        "", "exporters/dialects", "exporters/writers", "exporters/checks", "exporters/drivers", "exporters", "engine",
        "reports", "compiler.py", "export_model.py", "generation.py",
        "dynamo", "planner.py", "quality", "trace", "cli", "__init__.py", "__main__.py",
    ),
}  # fmt: skip
MAX_FILES = 20

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


def room_of(path: Path) -> str:
    """The room of a file, relative to the part of the house that it belongs to."""
    part, *folders = path.parts[:-1]
    return path.name if not folders and path.name in ORDER[part] else "/".join(folders)


def order_faults(root: Path) -> list[str]:
    """Imports that lead from a room up to a later one; with none of them there is no cycle either."""
    faults = []
    for part, order in ORDER.items():
        modules = {
            ".".join((*(() if part == "kvpass" else ("kvpass",)), *path.with_suffix("").parts)): path
            for path in python_files(root, part)
        }
        for path in modules.values():
            if path.parts[1] in ROOMS:
                continue
            if room_of(path) not in order:
                faults.append(f"{path} is in a room that has no place in the order")
                continue
            for line, names in imported((root / path).read_text()):
                to = next((modules[name] for name in reversed(names) if name in modules), None)
                if to is not None and room_of(to) in order and order.index(room_of(to)) > order.index(room_of(path)):
                    faults.append(f"{path}:{line}: {room_of(path) or part} may not import from {room_of(to)}")
    return faults


def crowded_rooms(root: Path) -> list[str]:
    folders = [path.parent for part in ORDER for path in python_files(root, part)]
    counts = {folder: folders.count(folder) for folder in folders}
    return [f"{folder} has {n} files, more than {MAX_FILES}" for folder, n in counts.items() if n > MAX_FILES]


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


RULES = [
    crowded_rooms,
    import_faults,
    link_faults,
    long_files,
    model_name_faults,
    order_faults,
    package_faults,
]
