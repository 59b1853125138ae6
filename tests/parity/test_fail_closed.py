"""What breaks behind the passes is a refusal that names the stage; errors survive a pickle."""

import pickle
from typing import Any

import pytest

import kvpass
from kvpass import compiler, errors
from kvpass.fx_passes.lowering.insert_cache import InsertCache
from kvpass.fx_passes.optimization.fuse_writes import FuseWrites
from kvpass.fx_passes.planning.plan_cache import ChooseStorage, LimitLength
from kvpass.fx_passes.validation import checks
from kvpass.report import RewriteReport, Verification
from kvpass.types import Refusal
from tests.decoders.catalogue import DECODERS
from tests.parity.harness import CONFIG, SEED

BROKEN: dict[str, tuple[Any, str]] = {  # by the name that a refusal has to give: what breaks
    "choose-storage": (ChooseStorage, "apply"),
    "limit-length": (LimitLength, "apply"),
    "insert-cache": (InsertCache, "apply"),
    "fuse-writes": (FuseWrites, "apply"),
    "bind": (compiler, "PagedModule"),
    "calibrate": (checks, "calibrate"),
    "verify": (checks, "verify"),
    "compare-capture": (checks, "compare_capture"),
}


def compile_breaking(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(*BROKEN[name], broken)
    kvpass.compile(
        DECODERS["GQA by repeat_interleave"](SEED), kvpass.CacheConfig(dtype="fp8_e4m3", block_size=16, num_blocks=8)
    )


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_stage_is_a_refusal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kvpass.RefusedError, match="a defect of kvpass worth a report: KeyError") as caught:
        compile_breaking(name, KeyError("lost"), monkeypatch)
    assert [refusal.pass_name for refusal in caught.value.report.refusals] == [name]
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("error", [kvpass.ConfigError("an option"), MemoryError()])
def test_what_the_caller_can_mend_stays(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)) as caught:
        compile_breaking("choose-storage", error, monkeypatch)
    assert caught.value is error


CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception | Warning)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_survive_a_pickle(kind: type[Exception]) -> None:
    report = RewriteReport((), (Refusal("no", "node"),), Verification(False, ("FAILED",), 1.0, 0.1, 0.0))
    error = kind("what", report) if issubclass(kind, errors.RefusedError) else kind("what")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == "what"
    assert getattr(again, "report", None) == getattr(error, "report", None)


def test_the_report_of_a_real_refusal_survives_a_pickle() -> None:
    with pytest.raises(kvpass.RefusedError) as caught:
        kvpass.compile(DECODERS["GQA by repeat_interleave"](SEED).layers[0].mlp.eval(), CONFIG)
    assert pickle.loads(pickle.dumps(caught.value)).report == caught.value.report
