"""Whether the weights are those that what is kept for reuse was computed with."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from kvpass.engine.step_loop import StepLoop
from kvpass.fx_passes.ledger_check import LedgerCheck, sample_of

WHOLE = 4096  # elements up to which a tensor is looked at as a whole
SAMPLE = 256  # evenly spaced elements of a larger one


_WATCHES: WeakSet[WeightsWatch] = WeakSet()


def _tell_watches(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for watch in list(_WATCHES):
        watch.note_optimizer(optimizer)


register_optimizer_step_post_hook(_tell_watches)


class WeightsWatch:
    """Looks at all parameters and buffers of a model: at their content when requests come in, at the rest at each step.

    A change in place through PyTorch is always seen: it has a version, or an optimizer made it. One that goes around it
    (``.data``, numpy) is seen by its address, or by its content when the engine was idle: that of small tensors as a
    whole, of larger ones that of :data:`SAMPLE` elements. After a change whatever was computed is worth nothing:
    requests under way are computed again, with the tokens that they have.

    Attributes:
        changes: how often something was seen to have changed.

    Args:
        guard: the model's tensors, and those whose values decided something; None where no model is known: then
            nothing is looked at.
        loop: asks before it takes requests in, and before each step.
        start_over: called, between two steps, to have what is under way computed again.
        forget: called, after that, when what is kept was computed with other weights.
    """

    def __init__(
        self,
        guard: LedgerCheck | None,
        loop: StepLoop,
        start_over: Callable[[], object],
        forget: Callable[[], object],
    ) -> None:
        self._guard = guard
        self._loop = loop
        self.changes = 0
        self._start_over = start_over
        self._forget = forget
        loop.before_admission = self._admit
        loop.before_step = self._go_on
        self._tensors = [] if guard is None else list(guard.tensors.values())
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._samples: list[Tensor] = []
        self._stepped = False
        self._known = self._marks()
        self._content = self._digest()
        if self._tensors:
            _WATCHES.add(self)

    def check(self) -> None:
        """Look before requests are submitted; at content as well where nothing is under way.

        Raises:
            WeightsChangedError: if the engine cannot go on with the model as it is.
        """
        if self._guard is not None:
            self._guard.check(content=not self._loop.has_work)

    def look(self) -> None:
        """See whether weights have changed, as before a step, for who answers without one."""
        with self._loop.exclusive():
            self._go_on()

    def forget(self) -> None:
        """Reuse nothing of what was computed up to now; then look at every byte whose value decided something.

        Raises:
            WeightsChangedError: as :meth:`check`.
        """
        with self._loop.exclusive():
            self._have_changed(idle=True)
            self._forget_all()
        if self._guard is not None:
            self._guard.check(whole=True)

    def _admit(self, idle: bool) -> None:
        if self._have_changed(idle):
            self._forget_all()

    def _go_on(self) -> None:
        if self._stepped or self._marks() != self._known:
            self._admit(idle=False)

    def note_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Look whether an optimizer that made a step has tensors of this model: a fused one leaves their versions."""
        held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        self._stepped = self._stepped or any(id(tensor) in held for tensor in self._tensors)

    def _forget_all(self) -> None:
        """Nothing that was computed before is used again."""
        self.changes += 1
        self._start_over()
        self._forget()

    def _have_changed(self, idle: bool) -> bool:
        """Whether weights changed since this was last asked; content is looked at where nothing is under way."""
        marks, stepped = self._marks(), self._stepped
        self._stepped = False
        if stepped or marks != self._known:
            self._known, self._samples = marks, []
            self._content = self._digest()
            return True
        if not idle:
            return False
        content = self._digest()
        changed, self._content = content != self._content, content
        return changed

    def _marks(self) -> tuple[list[int], list[int]]:
        """Versions and addresses of all tensors."""
        return [tensor._version for tensor in self._counted], [_address(tensor) for tensor in self._tensors]

    @torch.no_grad()
    def _digest(self) -> list[int]:
        """Of samples of all tensors, one number for each device and size of an element."""
        if not self._samples:
            self._samples = [_bits(tensor) for tensor in self._tensors if tensor.numel()]
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for sample in self._samples:
            alike.setdefault((sample.device, sample.dtype), []).append(sample)
        joined = [torch.cat(samples).cpu() for samples in alike.values()]
        return [zlib.crc32(content.view(torch.uint8).numpy().data) for content in joined]


def _bits(tensor: Tensor) -> Tensor:
    """The tensor, or a sample of it, as whole numbers ``[n]``: a view where it is dense."""
    chosen = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    chosen = chosen.reshape(-1) if chosen.numel() <= WHOLE else sample_of(chosen, SAMPLE)
    if chosen.is_complex():
        chosen = torch.view_as_real(chosen).flatten()
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return chosen.view(sizes[chosen.element_size()])


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor of a special kind has no memory of its own
        return 0
