"""kvpass: any PyTorch decoder, rewritten to run with a paged KV cache and proven equal to the original."""

import kvpass.kernels.ops  # noqa: F401 - registers the kvpass:: ops
from kvpass.compiler import compile, load
from kvpass.config import CacheConfig
from kvpass.declarations import declare_meaning, declare_tokenwise
from kvpass.dynamo.cached import CachedScope, cached
from kvpass.dynamo.incremental import IncrementalScope, incremental
from kvpass.dynamo.scopes import ScopeStats
from kvpass.engine.draft_engine import DraftEngine
from kvpass.engine.engine import Engine
from kvpass.engine.handle import Handle
from kvpass.engine.text_calls import TextOutput
from kvpass.errors import (
    CapacityError,
    CaptureError,
    ConfigError,
    InputError,
    IntegrityError,
    KvpassError,
    KvpassWarning,
    RefusedError,
    VerificationError,
    WeightsChangedError,
)
from kvpass.export_model import audit, export
from kvpass.exporters.audit import AuditResult
from kvpass.exporters.export_module import ExportResult
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.generation import generate, patch
from kvpass.report import RewriteReport, SiteReport
from kvpass.runtime.sampling.beam_search import Beam
from kvpass.runtime.sequences.requests import sample_seed
from kvpass.runtime.speculation.prompt_lookup import PromptLookup
from kvpass.types import (
    AttentionSinks,
    CachePlan,
    CacheSpec,
    HeavyHitters,
    MaskMeaning,
    Refusal,
    Sampling,
    StepInputs,
    TokenLogprobs,
)

__version__ = "0.1.0"

__all__ = [
    "AttentionSinks",
    "AuditResult",
    "Beam",
    "CacheConfig",
    "CachePlan",
    "CacheSpec",
    "CachedScope",
    "CapacityError",
    "CaptureError",
    "ConfigError",
    "DraftEngine",
    "Engine",
    "ExportResult",
    "Handle",
    "HeavyHitters",
    "IncrementalScope",
    "InputError",
    "IntegrityError",
    "KvpassError",
    "KvpassWarning",
    "MaskMeaning",
    "PagedModule",
    "PromptLookup",
    "Refusal",
    "RefusedError",
    "RewriteReport",
    "Sampling",
    "ScopeStats",
    "SiteReport",
    "StepInputs",
    "TextOutput",
    "TokenLogprobs",
    "VerificationError",
    "WeightsChangedError",
    "audit",
    "cached",
    "compile",
    "declare_meaning",
    "declare_tokenwise",
    "export",
    "generate",
    "incremental",
    "load",
    "patch",
    "sample_seed",
]
