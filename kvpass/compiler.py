"""``kvpass.compile``: from a decoder without a cache to an engine with a paged one, proven equal; ``kvpass.load``."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from kvpass.adapters import (
    MODEL,
    LogitsModel,
    check_example,
    end_of_sequence,
    example_for,
    example_ids,
    for_capture,
    locate_logits,
    text_sampling,
)
from kvpass.config import CacheConfig
from kvpass.declarations import declare_known_ops
from kvpass.engine.engine import Engine
from kvpass.errors import CaptureError, InputError, RefusedError
from kvpass.fx_passes.capture.alone import alone
from kvpass.fx_passes.capture.capture import capture
from kvpass.fx_passes.capture.diagnose_capture import convolutions_over_tokens
from kvpass.fx_passes.capture.kept_lengths import check_kept_lengths, kept_lengths
from kvpass.fx_passes.capture.logits_rows import every_row
from kvpass.fx_passes.graph import CapturedGraph, aten, is_call, shape_of
from kvpass.fx_passes.ledger_check import LedgerCheck
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.optimization.clean_up import count_nodes
from kvpass.fx_passes.pipeline import Refused, failing_closed
from kvpass.fx_passes.planning.plan_cache import GraphPlan
from kvpass.fx_passes.stages import lower, plan, prove, validate
from kvpass.fx_passes.validation.checks import Oracle, Validation, in_exact_formats
from kvpass.fx_passes.validation.verify import reference_graph
from kvpass.kernels.backends import has_kernel
from kvpass.loading import chat_tokenizer, load_model
from kvpass.progress import compile_progress
from kvpass.report import RewriteReport
from kvpass.reports.site_reports import site_reports, with_validation
from kvpass.runtime.sequences.output_text import decode_of
from kvpass.runtime.speculation.speculation import Drafter
from kvpass.types import HeavyHitters, Refusal

LOGGER = logging.getLogger("kvpass")
MUCH = 0.1  # of the largest logit: a loss by formats that is said without being asked for


def compile(
    model: nn.Module,
    config: CacheConfig | None = None,
    *,
    example_inputs: Any = None,
    verify: bool = True,
    tokenizer: Any = None,
    draft: Drafter | None = None,
) -> Engine:
    """Rewrite a decoder to run with a paged, shared KV cache.

    Args:
        model: a decoder whose forward takes token ids int64 ``[batch, length]`` (and ``position_ids``, where it
            demands them) and returns logits ``[batch, length, V]``: a tensor, an object with ``.logits``, a dict, or a
            tuple. In eval mode, on one device. Its parameters are used as they are, not copied, but for those that
            rotations of int4 and k4v2 caches are folded into, see ``CacheConfig(fold_rotations=...)``. They may change
            in place later; where one is replaced, or its value decided something (a mask, heads that were equal), the
            engine raises :class:`kvpass.WeightsChangedError` from then on.
        config: formats and size of the cache.
        example_inputs: token ids ``[B, S]``, or a pair of token ids and position ids when the model should be captured
            with position ids that it takes but does not demand. The token ids are also what fp8 caches are
            calibrated with: give some text then.
        verify: run original and rewritten model against each other before handing out the engine.
        tokenizer: of the ``tokenizers`` or the ``transformers`` library, for :meth:`kvpass.Engine.generate_text` and
            :meth:`kvpass.Engine.chat`. Where it only has to find the strings of ``Sampling(stop=...)``, any object with
            ``decode(token_ids)``, or such a function, will do.
        draft: who proposes tokens for speculative decoding, see :meth:`kvpass.Engine.speculate`.

    Returns:
        the engine; ``engine.report`` says what was done.

    Raises:
        InputError: if the model cannot be used as it is.
        RefusedError: if the rewrite could not be proven; carries the report.
        VerificationError: if it was proven but the outputs differ; carries the report.
    """
    config = config or CacheConfig()
    if not isinstance(config, CacheConfig):
        raise InputError(f"config is a {type(config).__name__}: pass kvpass.CacheConfig(...)")
    if tokenizer is not None:
        decode_of(tokenizer)
    device = check_model(model)
    adapter = LogitsModel(model, example_inputs is not None and check_example(example_inputs))
    adapter.eval()
    examples = None if example_inputs is None else example_ids(example_inputs).to(device)
    module, report = rewrite(adapter, config, device, verify, examples=examples)
    engine = Engine(module, module.plan, config, report, end_of_sequence(model), tokenizer, draft)
    engine.text_sampling = text_sampling(model)
    return engine


def load(
    name: str | os.PathLike[str],
    config: CacheConfig | None = None,
    *,
    verify: bool = True,
    draft: Drafter | None = None,
) -> Engine:
    """Load a model with its tokenizer and compile it: ``kvpass.load("FOLDER").chat([...])``.

    Args:
        name: the folder of a transformers model, one of a model that comes with kvpass (``pydecoder``, ``recall``), or
            ``module:callable``, which has no tokenizer.
        config: as for :func:`kvpass.compile`.
        verify: likewise.
        draft: likewise.

    Raises:
        InputError: if there is no such model, or it cannot be loaded.
        RefusedError: as :func:`kvpass.compile`.
        VerificationError: likewise.
    """
    loaded = load_model(os.fspath(name))
    tokenizer = chat_tokenizer(Path(name).expanduser()) or loaded.tokenizer
    engine = compile(loaded.model, config, verify=verify, tokenizer=tokenizer, draft=draft)
    engine.text_sampling = replace(engine.text_sampling, stop_token_ids=loaded.stop_token_ids)
    return engine


class Recompiler:
    """Compiles one model with several configurations, and captures it only once.

    Args:
        model: as for :func:`compile`; its parameters must not change meanwhile.

    Raises:
        InputError: if the model cannot be used as it is.
        RefusedError: if it cannot be captured.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = check_model(model)
        self._adapter = LogitsModel(model, False)
        self._adapter.eval()
        self._captured = capture_model(self._adapter, self._device)

    def compile(self, config: CacheConfig, verify: bool = True, examples: Tensor | None = None) -> Engine:
        """As :func:`compile`, with the same errors; fp8 caches are calibrated with ids ``examples [B, S]``."""
        module, report = rewrite(self._adapter, config, self._device, verify, self._captured.copy(), examples)
        return Engine(module, module.plan, config, report, end_of_sequence(self._model))


def check_model(model: nn.Module) -> torch.device:
    """The device of the model.

    Raises:
        InputError: if it is no module, is in training mode, or lives on several devices.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"kvpass.compile needs a torch.nn.Module, not a {type(model).__name__}")
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        raise InputError(f"{training[0]} is in training mode, where dropout is on: call model.eval() first")
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise InputError(f"the model lives on several devices ({names}): move it to one with model.to(device)")
    device = devices.pop() if devices else torch.device("cpu")
    if device.type == "meta":
        raise InputError("the model's weights are on the meta device: load them before kvpass.compile")
    return device


@alone()
def capture_model(model: LogitsModel, device: torch.device, inside: str = "") -> CapturedGraph:
    """The graph of an adapted model.

    Args:
        model: adapted.
        device: of its tensors.
        inside: path within the adapted module of what the user knows by name.

    Raises:
        RefusedError: if it cannot be captured.
    """
    declare_known_ops()
    example, prefix = example_for(model, device), f"{MODEL}.{MODEL}{inside and '.'}{inside}"
    locate_logits(model, example)
    convolutions = convolutions_over_tokens(for_capture(model), example, prefix)
    if convolutions:
        raise _refused(convolutions)
    try:
        with torch.no_grad():
            exported = for_capture(model)
            with kept_lengths(exported.model) as kept:
                captured = capture(exported, example, path_prefix=prefix)
            text = torch.arange(example[0].numel(), device=device).view_as(example[0]) % _vocabulary(captured)
            check_kept_lengths(model, kept, lambda: model(text, *example[1:]), MODEL)
            return captured
    except CaptureError as error:
        report = RewriteReport(refusals=(Refusal(str(error), pass_name="capture"),))
        raise RefusedError(f"kvpass could not capture the model. {error}", report) from error


def check_forgetting(plan: GraphPlan) -> None:
    """Refuse to forget tokens where what is left would not be attended to as it was.

    What is forgotten leaves no gap in the cache, so no mask or bias may depend on the distance of two tokens, beyond
    that none sees a later one.

    Raises:
        RefusedError: naming the first attention of which that is not so.
    """
    for site in plan.sites:
        mask = site.mask
        if any(one is not None for one in (mask.reach, mask.slopes, mask.bias, mask.prefix)):
            reason = f"its mask is {mask.describe()}: tokens can be forgotten only where every mask is causal alone"
            raise _refused([Refusal(reason, site.name, pass_name="plan-cache")])


def _refused(refusals: Sequence[Refusal], seconds: dict[str, float] | None = None) -> RefusedError:
    for refusal in refusals:
        LOGGER.info("refused by %s: %s", refusal.pass_name, refusal)
    listed = "\n".join(f"- {refusal}" for refusal in refusals[:8])
    message = f"kvpass cannot prove a rewrite of this model, and leaves it alone:\n{listed}"
    return RefusedError(message, RewriteReport(refusals=tuple(refusals), seconds=seconds or {}))


@contextmanager
def _as_refused_error(seconds: dict[str, float]) -> Iterator[None]:
    """What a stage refuses, as the error that carries the report."""
    try:
        yield
    except Refused as refused:
        log = refused.log
        raise _refused(log.refusals, seconds | log.seconds) from (log.error or refused)


@alone()
def rewrite(
    model: LogitsModel,
    config: CacheConfig,
    device: torch.device,
    check: bool = True,
    captured: CapturedGraph | None = None,
    examples: Tensor | None = None,
) -> tuple[PagedModule, RewriteReport]:
    """Run the passes on an adapted model, or on a capture of it, which is used up; gives the module and the report.

    Formats that need it are calibrated with the token ids ``examples [B, S]``, or with random ones.
    """
    with compile_progress() as begin:
        return _rewrite(begin, model, config, device, check, captured, examples)


def _rewrite(
    begin: Callable[[str], None],
    model: LogitsModel,
    config: CacheConfig,
    device: torch.device,
    check: bool,
    captured: CapturedGraph | None,
    examples: Tensor | None,
) -> tuple[PagedModule, RewriteReport]:
    begin("capture")
    start = time.perf_counter()
    captured = captured or capture_model(model, device)
    spent = time.perf_counter() - start
    seconds = {"export": captured.export_seconds, "capture": max(0.0, spent - captured.export_seconds)}
    before, untouched = count_nodes(captured.graph), captured.copy()
    with _as_refused_error(seconds):
        begin("proof")
        proof = prove(captured, config)
        begin("plan")
        planned = plan(proof, config, _vocabulary(captured))
        if config.forgetting is not None:
            check_forgetting(planned)
        reference = reference_graph(captured, [site.node.name for site in planned.sites])
        sites = site_reports(captured, planned)
        begin("rewrite")
        fuse = has_kernel("norm_rotary_write", device.type)
        paged = lower(proof, planned, fuse=fuse, fold=config.fold_rotations)
        with failing_closed(proof.log, "bind"):
            module = PagedModule(paged)
            tree_step = module.tree_step if paged.plan.prefix else None
        if isinstance(tree_step, Refusal):
            raise _refused([tree_step], seconds | proof.log.seconds)
        with failing_closed(proof.log, "calibrate"):
            exact, scales = in_exact_formats(paged, planned.cache_plan, device, examples)
        begin("verification")
        oracle = Oracle(model, every_row(model, captured.rows), untouched, reference)
        found = Validation(oracle, paged, exact, module, isinstance(config.forgetting, HeavyHitters))
        if check:
            validate(found, proof.log)
    after = count_nodes(paged.module.graph)
    report = RewriteReport(
        sites=sites,
        max_length=planned.cache_plan.max_length,
        max_length_reason=planned.cache_plan.max_length_reason,
        forbidden_tokens=planned.cache_plan.forbidden_tokens,
        seconds=seconds | proof.log.seconds,
        calls=(before[0], after[0]),
        launches=(before[1], after[1]),
        calibration=scales,
        rotations=paged.rotations,
        derived_bytes=paged.derived_bytes,
        declared=captured.declared,
    )
    report = with_validation(report, found)
    _log(report)
    module.guard = LedgerCheck(model.model, captured.ledger, captured.path_prefix, model.copied)
    return module, report


def _log(report: RewriteReport) -> None:
    """One line for each decision, for who asked :mod:`logging` for ``"kvpass"`` at INFO."""
    for site in report.sites:
        LOGGER.info(
            "%s: %s, %d query heads on %d, mask %s; stored: %s as %s, %d bytes a token instead of %d",
            site.name, site.spelling, site.query_heads, site.kv_heads, site.mask, site.cached, site.format,
            site.bytes_per_token, site.bytes_per_token_before,
        )  # fmt: skip
    if report.verification is not None:
        for check in report.verification.checks:
            LOGGER.info("%s", check)
        loss = report.verification.format_loss
        if loss is not None and loss > MUCH:
            LOGGER.warning(
                "caches in these formats move the logits by up to %.0f %% of the largest, on random tokens: "
                "kvpass eval measures what that does to text; a dtype of more bits loses less", 100 * loss,
            )  # fmt: skip
    whole, export = sum(report.seconds.values()), report.seconds["export"]
    LOGGER.info("compiled in %.1f s, %.1f s of them torch.export", whole, export)


def _vocabulary(captured: CapturedGraph) -> int:
    """Number of token ids that the model can look up; the width of its logits where no table says."""
    rows: list[int] = []
    for user in captured.input_ids.users:
        table = user.args[0]
        if is_call(user, aten.embedding) and user.args[1] is captured.input_ids and isinstance(table, Node):
            rows.append(int(shape_of(table)[0]))
    return min(rows, default=int(shape_of(captured.output)[-1]))
