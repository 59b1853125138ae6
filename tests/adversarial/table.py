"""All attacks, and the controls beside them."""

from tests.adversarial import (
    captures,
    controls,
    counting,
    far,
    masks,
    names,
    operands,
    others,
    outputs,
    parameters,
    positions,
)
from tests.adversarial.parts import Attack

ATTACKS = (
    *masks.ATTACKS,
    *counting.ATTACKS,
    *far.ATTACKS,
    *positions.ATTACKS,
    *operands.ATTACKS,
    *parameters.ATTACKS,
    *captures.ATTACKS,
    *outputs.ATTACKS,
    *names.ATTACKS,
    *others.ATTACKS,
)
CONTROLS = (*outputs.CONTROLS, *others.CONTROLS, *controls.CONTROLS)

# Judged in every run: those that were served wrong once, and every fourth of the others.
KNOWN = {
    "ALiBi steeper in a band", "all mul_ by 1.1", "batch_norm mean", "bias table, a parameter",
    "causal buffer becomes windowed", "conv1d kernel", "cut at 100 alone", "cut in a band by floor division",
    "dict, hidden first", "equal heads part", "gate: a run of triggers", "group_norm weight",
    "hidden as wide, logits", "int64 wraps", "known by text of the length", "layer_norm weight", "load_state_dict",
    "mask rolled by nothing", "mean behind a squeeze", "one head only", "one layer of two", "op getitem",
    "op grouped_mm", "op twist, tagged pointwise", "places by where", "places zero at multiples", "rms_norm weight",
    "rotary keys by where", "rotary reversed in a band", "scale by item", "seen by FakeTensor",
    "seen by is_exporting", "seen by symbolic size", "setattr of a module", "stride two in a band",
    "the future at multiples of 61", "through numpy", "window 8 at multiples of 64",
}  # fmt: skip


def quick() -> tuple[Attack, ...]:
    """What is judged in every run; the whole table takes some ten minutes."""
    rest = [attack for attack in (*ATTACKS, *CONTROLS) if attack.name not in KNOWN]
    known = [attack for attack in ATTACKS if attack.name in KNOWN]
    return (*known, *rest[::4])
