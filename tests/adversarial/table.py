"""All attacks, and the controls beside them."""

from tests.adversarial import captures, masks, operands, outputs, parameters, positions

ATTACKS = (
    *masks.ATTACKS,
    *positions.ATTACKS,
    *operands.ATTACKS,
    *parameters.ATTACKS,
    *captures.ATTACKS,
    *outputs.ATTACKS,
)
CONTROLS = (*outputs.CONTROLS,)
