"""What no cache can reproduce is refused before anything runs, by name and with the reason."""

import re

import pytest
import torch

import kvpass
from tests.decoders.refused import REFUSED
from tests.decoders.skeleton import VOCAB
from tests.parity.harness import CONFIG, SEED, original_logits, ragged_prompts


# Without the verification: the proof alone has to find it.
@pytest.mark.sampled(40, 2)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_the_node_and_the_module(name: str) -> None:
    build, words, module_path = REFUSED[name]
    with pytest.raises(kvpass.RefusedError) as caught:
        kvpass.compile(build(SEED), CONFIG, verify=False)
    refusals = caught.value.report.refusals
    told = [refusal for refusal in refusals if re.search(words, refusal.reason, re.IGNORECASE)]
    assert told, f"no reason speaks of {words}: {[str(refusal) for refusal in refusals]}"
    assert str(told[0].reason) in str(caught.value)
    assert told[0].pass_name
    if module_path:
        here = [r for r in told if r.module_path == module_path or r.module_path.startswith(module_path + ".")]
        assert here, f"not at {module_path}: {[(refusal.module_path, refusal.reason) for refusal in told]}"
        assert here[0].node


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["causal convolution", "mask one token ahead", "mask by token value"])
def test_refused_model_is_left_as_it_was(name: str) -> None:
    model = REFUSED[name].build(SEED)
    ids = torch.tensor([ragged_prompts(VOCAB)[1]])
    before, attributes = original_logits(model, ids), [sorted(vars(module)) for module in model.modules()]
    with pytest.raises(kvpass.RefusedError):
        kvpass.compile(model, CONFIG)
    assert torch.equal(original_logits(model, ids), before)
    assert [sorted(vars(module)) for module in model.modules()] == attributes


def test_report_of_a_refusal_prints() -> None:
    with pytest.raises(kvpass.RefusedError) as caught:
        kvpass.compile(REFUSED["causal convolution"].build(SEED), CONFIG)
    text = str(caught.value.report)
    assert "conv" in text and "layers.1.mixer" in text
    assert caught.value.report.to_dict()["refusals"]


def test_several_faults_are_all_told() -> None:
    model = REFUSED["cumulative mean"].build(SEED)
    model.layers[0] = REFUSED["mask one token ahead"].build(SEED).layers[0]
    with pytest.raises(kvpass.RefusedError) as caught:
        kvpass.compile(model, CONFIG)
    paths = {refusal.module_path for refusal in caught.value.report.refusals}
    assert any(path.startswith("layers.0") for path in paths)
    assert any(path.startswith("layers.1") for path in paths)
