"""What drafting costs and gains, measured on the engine's own steps."""

from __future__ import annotations

# Weight of what was known before, at each measurement: some twenty steps back still count.
_MEMORY = 0.95
# A step that took longer than this many times what was expected says more of the machine than of the step.
_OUTLIER = 3.0
# Share of the time of plain decoding that drafting may lose, and plain steps that it may lose to begin with.
_LOSS_PERMITTED = 0.005
_STEPS_TO_TRY = 1.0
# Steps with drafts after which it is known what they cost. The first of them does not count: its shapes are new.
_TRIALS = 3
# What was gained is no licence to lose as much later.
_MOST_KEPT = 2.0


class FadingLine:
    """A straight line through measurements (x, y) that count less the older they are."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._slope: float | None = None

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._weight > 0

    def add(self, x: float, y: float) -> None:
        """Take in one measurement."""
        self._weight = self._weight * _MEMORY + 1
        gain = 1 / self._weight
        dx, dy = x - self._x, y - self._y
        self._x += gain * dx
        self._y += gain * dy
        self._xx += gain * (dx * (x - self._x) - self._xx)
        self._xy += gain * (dx * (y - self._y) - self._xy)
        # While x hardly changes, the slope that was found before is kept.
        if self._xx > 0.01 * (1 + self._x * self._x):
            self._slope = max(0.0, self._xy / self._xx)

    @property
    def slope(self) -> float:
        """How much y grows with x; never negative. While x has hardly changed, y is taken to be proportional to it."""
        if self._slope is not None:
            return self._slope
        return max(0.0, self._y / self._x) if self._x > 0 else 0.0

    def at(self, x: float) -> float:
        """The line at ``x``."""
        return self._y + self.slope * (x - self._x)


class DraftCosts:
    """The time of a plain step by its sequences, what drafted tokens add to it, and the balance of both.

    The balance is time won minus time lost, against plain decoding at the same throughput. Drafting that does not pay
    may lose 0.5 % of the time that plain decoding takes, and a step to begin with; beyond, it has to wait.

    Attributes:
        balance: seconds; drafting is permitted as long as it is not negative.
    """

    def __init__(self) -> None:
        self._plain = FadingLine()
        self._added = FadingLine()
        self._trials = 0
        self.balance = 0.0

    @property
    def known(self) -> bool:
        """Whether a plain step was measured, so that there is something to compare with."""
        return self._plain.known

    @property
    def tried(self) -> bool:
        """Whether enough steps with drafts were measured to tell what they cost."""
        return self._trials >= _TRIALS

    @property
    def token_slope(self) -> float:
        """Seconds that one more drafted token adds to a step."""
        return self._added.slope

    def plain_step(self, sequences: int) -> float:
        """Seconds of a step of so many sequences with no drafts."""
        return max(1e-9, self._plain.at(sequences))

    def added(self, drafted: int) -> float:
        """Seconds that so many drafted tokens add to a step; 0 as long as none were tried."""
        return max(0.0, self._added.at(drafted)) if self._added.known else 0.0

    def add_plain(self, sequences: int, seconds: float, drafting: float) -> None:
        """A step without drafts was computed in ``seconds``; ``drafting`` of them went to look for some."""
        computing = seconds - drafting
        if self._plain.known:
            computing = min(computing, _OUTLIER * self.plain_step(sequences))
        else:
            self.balance = _STEPS_TO_TRY * computing
        self._plain.add(sequences, computing)
        self._book(_LOSS_PERMITTED * computing - drafting)

    def add_drafted(self, sequences: int, drafted: int, accepted: int, seconds: float) -> None:
        """A step with ``drafted`` proposed tokens was computed, ``accepted`` of which were right."""
        plain = self.plain_step(sequences)
        added = min(seconds, _OUTLIER * (plain + self.added(drafted))) - plain
        self._trials += 1
        if self._trials > 1:
            self._added.add(drafted, added)
        # So many tokens would have taken plain decoding the same share of its steps.
        won = accepted / sequences * plain
        self._book(won - added + _LOSS_PERMITTED * (plain + won))

    def _book(self, seconds: float) -> None:
        most = _MOST_KEPT * self.plain_step(1)
        self.balance = min(self.balance + seconds, max(most, self.balance))
