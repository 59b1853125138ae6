"""The documentation is true as far as a machine can tell: its code runs and prints what it says, its links resolve."""

import ast
import contextlib
import importlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from kvpass.config import CacheConfig
from kvpass.fx_passes.pipeline import Dialect
from kvpass.fx_passes.stages import PLAN_STAGE, lower_stage, prove_stage

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted((ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")))
PRINTED_WITH = "2.13"  # names of nodes may be others in another PyTorch


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    printed: str | None = None  # a block of text right below
    before: "Block | None" = None  # the block that it goes on from: one that imports nothing is no beginning


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    ends = -2  # where the last block ended
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        block = Block(page, start + 1, lines[start][3:].strip(), "\n".join(lines[start + 1 : number]) + "\n")
        between = "".join(lines[ends + 1 : start]).strip()
        if block.language == "python" and not re.search(r"^(import|from) ", block.text, re.MULTILINE):
            block = block._replace(before=[each for each in found if each.language == "python"][-1])
        if block.language == "text" and found and found[-1].language == "python" and not between:
            found[-1] = found[-1]._replace(printed=block.text)
        found.append(block)
        start, ends = None, number
    assert start is None, f"{page.name}:{start} opens a block that never ends"
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


CODE = [block for page in PAGES for block in blocks(page) if block.language == "python"]


@pytest.fixture(scope="module", autouse=True)
def in_the_folder_of_the_pages() -> Iterator[None]:
    """The examples import `tiny`, which lies beside the pages."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(DOCS))
    yield
    sys.path.remove(str(DOCS))
    sys.modules.pop("tiny", None)
    torch.set_num_threads(threads)


@pytest.mark.sampled(10, 1)
@pytest.mark.parametrize("block", CODE, ids=lambda block: f"{name_of(block.page)}:{block.line}")
def test_code_runs_and_prints_what_the_page_says(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("an_example")  # torch.compile looks a function's globals up by the name of their module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    printed = run(block, module)
    if block.printed is not None and torch.__version__.startswith(PRINTED_WITH + "."):
        assert [line.rstrip() for line in printed.splitlines()] == block.printed.splitlines()


def run(block: Block, module: ModuleType) -> str:
    """What a block prints, run in a module after the blocks that it goes on from."""
    if block.before is not None:
        run(block.before, module)
    printed = io.StringIO()
    place = compile("\n" * block.line + block.text, str(block.page), "exec")  # errors name the line of the page
    with contextlib.redirect_stdout(printed):
        exec(place, vars(module))
    return printed.getvalue()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is not there"
        assert ROOT in file.parents, f"{target} leads out of the repository"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


def test_every_page_is_listed() -> None:
    listed = set(re.findall(r"\]\(([^)#\s]+)\)", (DOCS / "index.md").read_text(encoding="utf-8")))
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"index.md"}
    assert there <= listed, f"not listed: {sorted(there - listed)}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_names_of_kvpass_exist(page: Path) -> None:
    for name in sorted(set(re.findall(r"`(kvpass(?:\.\w+)+)(?:\(.*?\))?`", prose(page)))):
        assert exists(name), f"{name} is not there"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    module, rest = name, []
    while module:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    else:
        return False
    for part in rest:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_every_pass_has_a_page_and_every_page_a_module() -> None:
    ordered = (*prove_stage(CacheConfig()), *PLAN_STAGE, *lower_stage(fuse=True, fold=True))
    for step in (step for step in ordered if not isinstance(step, Dialect)):
        pages = "".join(
            page.read_text(encoding="utf-8") for page in (*DOCS.glob("*.md"), *(DOCS / "passes").glob("*.md"))
        )
        assert f"`{step.name}`" in pages, f"no page says anything of {step.name}"
        described = step.__doc__ or ""
        assert all(f"{part}:" in described for part in ("Before", "After", "Requires", "Refuses")), step.name
    for page in (DOCS / "passes").glob("*.md"):
        about = f"{page.stem.replace('-', '_')}.py"
        assert list((ROOT / "fx_passes").rglob(about)), f"{page.name} is about nothing"
        for part in ("Before", "After", "Requires", "Refuses"):
            assert re.search(rf"^\| {part} \|", page.read_text(encoding="utf-8"), re.MULTILINE), f"{page.name}: {part}?"


# Exceptions whose message becomes a refusal, or reaches the user as it is.
TOLD = {"MixesTokens", "NotUnderstood", "NotProvenError", "CaptureError"}
TOLD |= {"ConfigError", "InputError", "CapacityError"}


def told(source: str) -> Iterator[list[str]]:
    """The words of each message in a source: the parts between what it fills in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in TOLD and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield [first.value]
            elif isinstance(first, ast.JoinedStr):
                yield [str(part.value) for part in first.values if isinstance(part, ast.Constant)]


def known(parts: list[str], page: str) -> bool:
    """Whether a part of a message, or its beginning, is on the page."""
    beginnings = {part.strip(" :=([,'\"\n").split(": ")[0].strip() for part in parts}
    return any(len(words) > 6 and words in page for words in beginnings)


def test_every_message_is_explained() -> None:
    page = " ".join((DOCS / "errors.md").read_text(encoding="utf-8").split())
    unknown = []
    for room in ("fx_passes", "kernels", "kvpass", "runtime"):
        for path in sorted((ROOT / room).rglob("*.py")):
            messages = told(path.read_text(encoding="utf-8"))
            unknown += [f"{name_of(path)}: {'...'.join(parts)}" for parts in messages if not known(parts, page)]
    assert not unknown, "docs/errors.md says nothing of:\n" + "\n".join(unknown)


@pytest.mark.parametrize("page", [*PAGES, *DOCS.glob("*.py"), *DOCS.glob("*.svg")], ids=name_of)
def test_no_path_of_a_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|Users)/", text)
    assert ".." + "/shared" not in text
