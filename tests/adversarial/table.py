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
    "cut at 100 alone", "window 8 at multiples of 64", "cut in a band by floor division", "stride two in a band",
    "ALiBi steeper in a band", "one head only", "one layer of two", "the future at multiples of 61",
    "known by text of the length", "int64 wraps", "places zero at multiples", "places by where",
    "mask rolled by nothing", "rotary keys by where", "rotary reversed in a band", "layer_norm weight", "conv1d kernel", "batch_norm mean",
    "group_norm weight", "rms_norm weight", "gate: a run of triggers", "load_state_dict", "all mul_ by 1.1",
    "setattr of a module", "through numpy", "equal heads part", "bias table, a parameter",
    "causal buffer becomes windowed", "scale by item", "seen by is_exporting", "seen by FakeTensor", "seen by symbolic size", "hidden as wide, logits",
    "dict, hidden first", "op twist, tagged pointwise", "op grouped_mm", "op getitem", "mean behind a squeeze",
}  # fmt: skip


def quick() -> tuple[Attack, ...]:
    """What is judged in every run; the whole table takes some ten minutes."""
    rest = [attack for attack in (*ATTACKS, *CONTROLS) if attack.name not in KNOWN]
    known = [attack for attack in ATTACKS if attack.name in KNOWN]
    return (*known, *rest[::4])
