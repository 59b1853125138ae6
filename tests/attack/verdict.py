"""What became of one example, and how examples are numbered."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("operands", "lengths", "parameters")
PER_SEED = 900_000  # examples of one seed of the sweep; a whole number of groups of every kind


@dataclass(frozen=True)
class Verdict:
    """What became of one example.

    Attributes:
        number: of the example; draws it again.
        outcome: "right", "refused" or "wrong".
        control: nothing was hidden in it, so a refusal loses something.
        detail: the reason of the refusal, or what is wrong.
        text: the example, spelled out.
        said: the engine was told of the change, which its samples may miss by design.
    """

    number: int
    outcome: str
    control: bool
    detail: str
    text: str
    said: bool = False

    @property
    def kind(self) -> str:
        """One of `KINDS`; the numbers take turns."""
        return KINDS[self.number % len(KINDS)]

    def __str__(self) -> str:
        what = "control" if self.control else "attack"
        return f"--only {self.number} ({self.kind}, {what}): {self.outcome}: {self.detail}\n{self.text}"
