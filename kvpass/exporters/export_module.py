"""A rewritten model as a folder: checked before anything is written, audited before it gets its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from kvpass.errors import ConfigError, InputError, VerificationError
from kvpass.exporters.audit import AuditResult, audit
from kvpass.exporters.checks.probes import make_probe
from kvpass.exporters.dialects.contracts import Port
from kvpass.exporters.dialects.exported_step import ExportedStep, refuse, untranslated
from kvpass.exporters.dialects.native_ops import NATIVE
from kvpass.exporters.examples import example_of
from kvpass.exporters.extras import require
from kvpass.exporters.formats import FORMATS, Format, Source, find_format
from kvpass.exporters.manifest import PROBE_FILE, make_manifest, write_manifest
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.report import RewriteReport

CONTEXT = 2048  # places of a row of a static cache where nobody says how many
SMALLEST_CONTEXT = 32
EXAMPLE_FILE = "run.py"
STAGES = ("graph", "file", "probe", "audit")


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        folder: where.
        format: in which format.
        files: bytes of each file.
        audit: what the audit found; None if it was not asked for.
    """

    folder: Path
    format: str
    files: dict[str, int]
    audit: AuditResult | None


def export_module(
    module: PagedModule,
    report: RewriteReport,
    fingerprint: Callable[[], str],
    path: str | os.PathLike[str],
    format: str,
    context: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
    tokenizer: Any = None,
    check: bool = True,
    begin: Callable[[str], None] = lambda stage: None,
) -> ExportResult:
    """Write a rewritten model in a format.

    Args:
        module: the rewritten model, on the CPU.
        report: how it was proven.
        fingerprint: gives a digest of its weights.
        path: the folder to be made; nothing may be there.
        format: one of :data:`~kvpass.exporters.formats.FORMATS`.
        context: places of a row, of formats with static caches; at most what the model is proven for.
        eos_token_ids: tokens that end a text, for formats that bring a generator.
        tokenizer: likewise.
        check: whether the file is audited before it gets its name.
        begin: called with the name of each of :data:`STAGES` as it begins.

    Raises:
        ConfigError: if there is no such format, or the context cannot be used.
        InputError: if the place cannot be written to, or something that the format needs is not installed.
        RefusedError: if the format cannot express the model.
        VerificationError: if the file is wrong; nothing is left of it.
    """
    form, target = find_format(format), Path(path).expanduser().absolute()
    context = _context(module, form, context)
    require(form.name, form.needs)
    found = form.refusals(module)
    if found:
        others = [row.name for row in FORMATS.values() if not row.refusals(module)]
        raise refuse(found, form.name, others)
    with _staged(target) as folder:
        begin("graph")
        step = ExportedStep(module, form.dialect, form.contract(context), form.gives_caches)
        outputs = _outputs(module, form, step.ports)
        begin("file")
        try:
            form.write(Source(step, outputs, eos_token_ids, tokenizer), folder)
        except (OSError, VerificationError):
            raise
        except Exception as error:  # translators raise classes of their own
            raise untranslated(form.name, error) from error
        begin("probe")
        limit = context if form.is_static else None
        probe = make_probe(module, limit, by_reference=form.dialect != NATIVE)
        (folder / PROBE_FILE).write_text(json.dumps(probe), encoding="utf-8")
        (folder / EXAMPLE_FILE).write_text(example_of(form.name), encoding="utf-8")
        how = type(step.contract).__doc__ or ""
        data = report.to_dict()
        manifest = make_manifest(form.name, fingerprint(), module.plan, step.ports, outputs, limit, data, how)
        more: dict[str, Any] = {"not_run": form.not_run} if form.not_run else {}
        more |= {"largest_batch": form.batch} if form.batch else {}
        write_manifest(folder, {**manifest, "imports": form.imports(module), **more})
        begin("audit")
        result = audit(folder) if check else None
        sizes = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
    return ExportResult(target, form.name, sizes, result)


def _outputs(module: PagedModule, form: Format, ports: list[Port]) -> tuple[Port, ...]:
    output = next(n for n in module.graph_module.graph.nodes if n.op == "output").args[0][0]
    value = (output[0] if isinstance(output, (tuple, list)) else output).meta["val"]
    width = int(value.shape[-1])
    shapes: dict[str, tuple[int | str, ...]] = {"paged": ("rows", width), "static": ("batch", width)}
    meaning = "logits of the rows asked for" if form.caches == "paged" else "logits of the last new token of each row"
    logits = Port("logits", value.dtype, shapes.get(form.caches, ("batch", 1, width)), meaning)
    if not form.gives_caches:
        return (logits,)
    return logits, *(after(port, form) for port in ports if port.cache is not None)


def after(port: Port, form: Format) -> Port:
    """The output that is a cache after the step."""
    grows = form.caches == "growing"
    name = port.name.replace("past_key_values", "present") if grows else f"{port.name}_out"
    shape = tuple("total" if size == "past" else size for size in port.shape)
    return replace(port, name=name, shape=shape, meaning=f"{port.name} after the step")


def _context(module: PagedModule, form: Format, context: int | None) -> int:
    longest = module.plan.max_length
    if not form.is_static:
        if context is not None:
            raise ConfigError(f"format {form.name} has no context of its own, its caches are pools: leave it out")
        return 0
    if context is None:
        return CONTEXT if longest is None else min(CONTEXT, longest)
    if not isinstance(context, int) or isinstance(context, bool) or context < SMALLEST_CONTEXT:
        raise ConfigError(f"context={context!r} is no number of tokens from {SMALLEST_CONTEXT} on")
    if longest is not None and context > longest:
        raise ConfigError(f"context={context} is more than the model is proven for, {longest} tokens: "
                          f"{module.plan.max_length_reason}")  # fmt: skip
    return context


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that gets its name when the block is done, and is removed where it fails."""
    if target.exists():
        raise InputError(f"{target} exists already: choose another folder, or remove it")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise InputError(f"{target.parent} is no folder that can be written to: choose another, or make it")
    folder = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(target)
    except OSError as error:
        raise InputError(f"{target} could not be written, and nothing is left of it: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
