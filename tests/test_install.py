"""kvpass as it is shipped: what a wheel and an sdist hold, and that each way to install it leaves transformers well."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("fx_passes", "kernels", "models", "runtime")
SOURCES_OF_LIBRARIES = {".cpp", ".cc", ".c", ".h", ".hpp"}
LIBRARIES = {".so", ".pyd", ".dylib"}
LEFT_BEHIND = shutil.ignore_patterns(
    ".*", "build", "dist", "venv", "__pycache__", "*.egg-info", "*.pyc", *(f"*{suffix}" for suffix in LIBRARIES)
)


def run_python(*arguments, cwd, **environment):
    """Run this interpreter with no PYTHONPATH but the one given; its standard output."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean["KVPASS_CPU_LEVELS"] = "base"  # one level of the native kernels tells as much as all, and sooner
    clean["KVPASS_CPU_FLAGS"] = "-O0"  # nobody runs them here
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree as a fresh clone has it: nothing built, links kept as links."""
    copy = tmp_path_factory.mktemp("checkout") / "kvpass"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_BEHIND)
    return copy


@pytest.fixture(scope="module")
def archives(checkout, tmp_path_factory):
    """(wheel, sdist), built as an installer builds them, with the setuptools that is here."""
    out = tmp_path_factory.mktemp("archives")
    build = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    run_python("-c", build, cwd=checkout)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def shipped(root):
    """Every file that the tree has to offer of kvpass and its rooms, relative to `root`, each once."""
    found = [path.relative_to(root) for top in ("kvpass", *ROOMS) for path in (root / top).rglob("*.*")]
    linked = {path for path in found if path.parts[0] == "kvpass" and path.parts[1] in ROOMS}
    return {path for path in found if (root / path).is_file() and path.suffix != ".pyc"} - linked


def test_the_wheel_holds_every_module_and_data_file_once(checkout, archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        names = Counter(name for name in wheel.namelist() if ".dist-info/" not in name)
        sizes = {info.filename: info.file_size for info in wheel.infolist()}
    assert {name: count for name, count in names.items() if count > 1} == {}
    expected = {
        (path if path.parts[0] == "kvpass" else Path("kvpass", path)).as_posix(): (checkout / path).stat().st_size
        for path in shipped(checkout)
        if path.suffix not in SOURCES_OF_LIBRARIES
    }
    unbuilt = {n for n in names if Path(n).suffix not in LIBRARIES | SOURCES_OF_LIBRARIES}
    assert unbuilt == expected.keys()
    assert [n for n in names if Path(n).suffix in LIBRARIES] == ["kvpass/kernels/cpu/libkvpass_cpu_base.so"]
    assert {name: sizes[name] for name in expected} == expected
    assert "kvpass/py.typed" in names


def test_the_sdist_holds_every_source_once(checkout, archives):
    with tarfile.open(archives[1]) as sdist:
        names = Counter(Path(*Path(member.name).parts[1:]) for member in sdist.getmembers() if member.isfile())
    assert {name: count for name, count in names.items() if count > 1} == {}
    assert {name for name in names if name.parts[0] in ("kvpass", *ROOMS)} == shipped(checkout)
    assert {Path("pyproject.toml"), Path("README.md"), Path("LICENSE")} <= names.keys()


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(archives, tmp_path):
    with tarfile.open(archives[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run_python("-c", f"from setuptools import build_meta as b; b.build_wheel({str(tmp_path)!r})", cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as again, zipfile.ZipFile(archives[0]) as first:
        assert sorted(again.namelist()) == sorted(first.namelist())


def test_an_install_without_a_compiler_succeeds_and_leaves_the_kernels_out(checkout, tmp_path):
    build = f"from setuptools import build_meta as b; b.build_wheel({str(tmp_path)!r})"
    fresh = tmp_path / "fresh"  # another test may have built in the checkout
    shutil.copytree(checkout, fresh, symlinks=True, ignore=LEFT_BEHIND)
    run_python("-c", build, cwd=fresh, CC="no-such-compiler", CXX="no-such-compiler")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        assert not [name for name in built.namelist() if Path(name).suffix in LIBRARIES]
        assert "kvpass/kernels/cpu/loader.py" in built.namelist()


# As a pytest test: transformers works beside kvpass, and each of the modules is found below home.
PROBE = """
import importlib.metadata, importlib.util, pathlib, sys
import torch, transformers
from transformers.utils.import_utils import is_kernels_available
import kvpass

def test_all_is_well():
    installed = any(found.name == "kernels" for found in importlib.metadata.distributions())
    found = importlib.util.find_spec("kernels")
    assert installed or found is None or found.origin is None, "our kernels is importable by its bare name"
    assert installed or not is_kernels_available(), "transformers took our kernels for the package of that name"
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=16)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    assert model(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, 16)
    home = pathlib.Path({home!r})
    for name in {modules!r}:
        assert pathlib.Path(importlib.util.find_spec(name).origin).is_relative_to(home), name
    assert not {{"fx_passes", "models", "runtime"}} & sys.modules.keys()
"""


def modules_of(root):
    for path in shipped(root):
        if path.suffix == ".py":
            parts = path.with_suffix("").parts
            yield ".".join(parts if parts[0] == "kvpass" else ("kvpass", *parts)).removesuffix(".__init__")


def probe(home, checkout):
    return PROBE.format(home=str(home), modules=sorted(modules_of(checkout)))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wheel", "checkout on the path", "checkout as the working directory"])
def test_transformers_works_beside(way, checkout, archives, tmp_path):
    pytest.importorskip("transformers")
    home, cwd, environment = checkout, tmp_path, {}
    if way == "wheel":
        home = tmp_path / "site"
        zipfile.ZipFile(archives[0]).extractall(home)
    if way == "checkout as the working directory":
        cwd = checkout
    else:
        environment["PYTHONPATH"] = str(home)
    run_python("-c", probe(home, checkout) + "test_all_is_well()", cwd=cwd, **environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [("-P", "-c", "import pytest, sys; sys.exit(pytest.main())"), ("-m", "pytest")],
    ids=["pytest", "python -m pytest"],
)
def test_transformers_works_under(start, checkout):
    pytest.importorskip("transformers")
    (checkout / "tests/test_probe.py").write_text(probe(checkout, checkout))
    assert "1 passed" in run_python(*start, "-q", "tests/test_probe.py", cwd=checkout)
