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

# Judged in every run: the plainest of those that were served wrong once, and every tenth of the others.
KNOWN = {
    "ALiBi steeper in a band", "a batch of one", "all mul_ by 1.1", "batch_norm mean", "bias table, a parameter",
    "causal buffer becomes windowed", "conv1d kernel", "conv2d bias", "copy without a window",
    "counted by column of a mask", "counted by norm", "cut at 100 alone", "cut in a band by floor division",
    "equal heads part", "gate: a run of triggers", "group_norm weight", "hidden as wide, logits",
    "hidden, last row of logits", "int64 wraps", "known by text of the length", "layer_norm weight",
    "load_state_dict", "longest length so far", "mask rolled by nothing", "one head only",
    "one layer of two", "op grouped_mm",
    "op in a mask, tagged pointwise", "op of a weight that remembers", "op twist, tagged pointwise",
    "places by where", "places zero at multiples", "returns wider than the vocabulary", "rms_norm weight",
    "rotary keys by where", "rotary reversed in a band", "seen by FakeTensor", "seen by is_exporting",
    "seen by symbolic size", "seen by the type of a weight", "setattr of a module", "sevens found by numpy",
    "sevens found by text", "stride two in a band", "the future at multiples of 61", "through numpy",
    "weights in double", "window 8 at multiples of 64",
}  # fmt: skip


def quick() -> tuple[Attack, ...]:
    """What is judged in every run; the whole table takes some ten minutes."""
    rest = [attack for attack in (*ATTACKS, *CONTROLS) if attack.name not in KNOWN]
    known = [attack for attack in (*ATTACKS, *CONTROLS) if attack.name in KNOWN]
    return (*known, *rest[::10])
