"""All attacks, and the controls beside them."""

from tests.adversarial import captures, controls, masks, names, operands, others, outputs, parameters, positions

ATTACKS = (
    *masks.ATTACKS,
    *positions.ATTACKS,
    *operands.ATTACKS,
    *parameters.ATTACKS,
    *captures.ATTACKS,
    *outputs.ATTACKS,
    *names.ATTACKS,
    *others.ATTACKS,
)
CONTROLS = (*outputs.CONTROLS, *others.CONTROLS, *controls.CONTROLS)
