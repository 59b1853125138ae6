"""Every error that kvpass raises on purpose.

An error says what was found, where (module path and node), and what the user can do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpass.report import RewriteReport


class KvpassError(Exception):
    """Base of all errors raised by kvpass."""


class ConfigError(KvpassError, ValueError):
    """An option of :class:`kvpass.CacheConfig` or :class:`kvpass.Sampling` has a value that cannot be used."""


class InputError(KvpassError, ValueError):
    """A model, prompt or argument cannot be used as it is; the message says what to change."""


class CapacityError(KvpassError):
    """The block pool is too small for a request, even when nothing else runs."""


class CaptureError(KvpassError):
    """``torch.export`` could not turn the module into one graph."""


class IntegrityError(KvpassError):
    """An invariant of the block pool does not hold: a defect of kvpass, never of the caller."""


class KvpassWarning(RuntimeWarning):
    """kvpass goes on, but slower, or without something that was asked for; the message says why."""


class WeightsChangedError(KvpassError):
    """A parameter or buffer was changed after the model was compiled, in a way that the rewrite cannot follow.

    The message names it, says what its value decided, and what to do.
    """


class RefusedError(KvpassError):
    """The rewrite could not be proven equal to the original, so nothing was rewritten.

    Attributes:
        report: what was found, site by site, and every refusal with its node, module path and reason.
    """

    def __init__(self, message: str, report: RewriteReport) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.report), self.__dict__


class VerificationError(RefusedError):
    """The rewritten graph was built, but its outputs differ from the original's."""
