"""All attacks and controls in turn, with what became of each: `python -m tests.adversarial.sweep [--real] [words]`."""

import sys
import time
from collections import Counter, defaultdict

from tests.adversarial.judge import judge, unreal
from tests.adversarial.table import ATTACKS, CONTROLS


def main(arguments: list[str]) -> None:
    """Judge the attacks whose name or class holds one of the words; all without words."""
    words = [word for word in arguments if not word.startswith("--")]
    chosen = [a for a in (*ATTACKS, *CONTROLS) if not words or any(w in f"{a.klass}: {a.name}" for w in words)]
    found: dict[str, Counter[str]] = defaultdict(Counter)
    begun = time.perf_counter()
    for attack in chosen:
        start = time.perf_counter()
        same = unreal(attack) if attack.claims else []
        vacuous = f" VACUOUS at {same}" if same else ""
        verdict = "" if "--real" in arguments else judge(attack)
        found[attack.klass][getattr(verdict, "outcome", "?")] += 1
        spent = time.perf_counter() - start
        print(f"{spent:5.1f} s  {attack.klass}: {attack.name}{vacuous} -> {verdict}", flush=True)
    for klass, outcomes in found.items():
        print(klass, dict(outcomes))
    print(f"{len(chosen)} in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
