"""No attack is served wrong: each is right at every length, text and state of its weights, or refused."""

from collections import Counter

import pytest

from tests.adversarial.judge import judge, unreal
from tests.adversarial.parts import Attack
from tests.adversarial.table import ATTACKS, CONTROLS, KNOWN, quick

# One of each class runs with every test, a third of the other quick ones with `make test-all`, the others with
# `make test-sweeps`, and the whole table by `python -m benchmarks.adversarial`.
SEEN: Counter[str] = Counter()


def _marks(attack: Attack) -> list[pytest.MarkDecorator]:
    SEEN[attack.klass] += 1
    if SEEN[attack.klass] <= 1:
        return []
    return [pytest.mark.sweep if SEEN[attack.klass] % 5 else pytest.mark.slow]


CASES = [pytest.param(attack, id=attack.name, marks=_marks(attack)) for attack in quick()]


def test_table_is_wide() -> None:
    names = Counter(attack.name for attack in (*ATTACKS, *CONTROLS))
    assert not [name for name, count in names.items() if count > 1]
    assert len(ATTACKS) >= 160
    assert len(CONTROLS) >= 25
    assert set(names) >= KNOWN
    assert not [attack.name for attack in ATTACKS if not attack.claims or not attack.lengths]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack_is_real(attack: Attack) -> None:
    """It differs from what it is mistaken for, at every length that it names."""
    assert unreal(attack) == []


@pytest.mark.parametrize("attack", CASES)
def test_never_silently_wrong(attack: Attack) -> None:
    verdict = judge(attack)
    assert verdict.outcome in attack.allowed, str(verdict)
