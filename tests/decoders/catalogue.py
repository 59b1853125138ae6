"""The decoders under test: name -> `build(seed)`.

Those of `DECODERS` must come out of kvpass with the same greedy tokens; those of `UNUSUAL` with the same, or refused.
"""

from functools import partial

from tests.decoders import (
    blocks,
    experts,
    forms,
    heads,
    latents,
    layouts,
    masks,
    padding,
    picked,
    positions,
    rotary,
    scores,
    softmaxes,
    unusual_attention,
)
from tests.decoders.skeleton import DIM, Builder, Decoder, GeluMLP, decoder, decoder_around, in_turn, one_layer_around

TEMPERATURES = ("query", "key", "weights", "weights of a key", "weights that are moved")

# Attention that leaves out most of the 60 tokens of a long prompt, even over two layers.
NEAR_SIGHTED = {
    "band of triu and tril, rotary",
    "window by distance, float mask",
    "chunks of eight",
    "forget gates",
    "flex_attention, softcap and GQA",
}

DECODERS: dict[str, Builder] = {
    # masks
    "einsum, tril of ones": decoder_around(masks.EinsumTrilOnes),
    "full of finfo.min, triu, added": decoder_around(masks.FullTriuFinfoMin),
    "where on two aranges": decoder_around(masks.CompareAranges),
    "masked_fill of -1e9": decoder_around(masks.MinusOneBillion),
    "boolean buffer into SDPA": decoder_around(masks.BoolBufferSDPA),
    "band of triu and tril, rotary": decoder_around(masks.BandRotary),
    "window by distance, float mask": decoder_around(masks.WindowByDistance),
    "hand-written softmax": decoder_around(masks.HandWrittenSoftmax),
    "chunks of eight": decoder_around(masks.ChunksOfEight),
    "strided": decoder_around(masks.Strided),
    "a window per head": decoder_around(masks.WindowPerHead),
    "learned bias for each pair of positions": decoder_around(masks.LearnedBiasTable),
    "window in every other layer": decoder(
        lambda: Decoder(in_turn(masks.BandRotary, masks.EinsumTrilOnes), num_layers=3)
    ),
    # layouts
    "GPT-2 with a tril buffer slice": decoder(layouts.TinyGPT),
    "nn.MultiheadAttention without weights": decoder_around(lambda: layouts.TorchAttention(need_weights=False)),
    "nn.MultiheadAttention with weights": decoder_around(layouts.TorchAttention),
    "nn.TransformerEncoder, pre-norm": decoder(lambda: layouts.TorchEncoderLayers(norm_first=True)),
    "nn.TransformerEncoder, post-norm": decoder(lambda: layouts.TorchEncoderLayers(norm_first=False)),
    "nn.TransformerEncoder, a mask alone": decoder(lambda: layouts.TorchStack(decoder=False)),
    "nn.TransformerDecoder, masks alone": decoder(lambda: layouts.TorchStack(decoder=True)),
    "nn.TransformerEncoder, time first": decoder(lambda: layouts.TorchEncoderLayers(True, batch_first=False)),
    "time first, bmm on merged heads": decoder(layouts.TimeFirst),
    "baddbmm on merged heads": decoder_around(layouts.BaddbmmBatch),
    "keys times queries": decoder_around(layouts.KeysTimesQueries),
    "channels first, 1x1 convolutions": decoder_around(layouts.ColumnsOfValues),
    # heads
    "GQA by repeat_interleave": decoder_around(heads.RepeatInterleave),
    "GQA by enable_gqa": decoder_around(heads.EnableGQA),
    "GQA by expand and reshape": decoder_around(heads.ExpandReshape),
    "GQA in five dims": decoder_around(heads.FiveDims),
    "GQA by tiling, head h % Hkv": decoder_around(heads.TiledHeads),
    "MQA with keys of two dims": decoder_around(heads.MultiQuery2D),
    "MQA by expand": decoder_around(heads.MultiQueryExpand),
    "values narrower than keys": decoder_around(heads.NarrowValues),
    "keys are values": decoder_around(heads.KeysAreValues),
    "gate per head": decoder_around(heads.GatedHeads),
    "latent keys and values": decoder_around(heads.LatentKeys),
    "latent by einsum, low-rank queries": decoder_around(latents.EinsumLatent),
    "keys and values of two latents": decoder_around(latents.TwoLatents),
    # positions
    "complex rotary": decoder_around(positions.ComplexRotary),
    "ALiBi from aranges": decoder_around(positions.ALiBi),
    "learned bias by log bucket": decoder_around(positions.LogBucketBias),
    "rotary table by position ids": decoder_around(positions.TransposedRotaryTable),
    "sinusoids in forward": decoder(positions.Sinusoids),
    "positions by cumsum of ones": decoder(positions.CountedPositions),
    "position table with an offset": decoder(positions.OffsetTable),
    "positions counted without padding": decoder(padding.CountsWithoutPadding),
    "padding hidden": decoder(padding.HidesPadding),
    "rotary by YaRN": decoder_around(rotary.Yarn),
    "rotary that changes with the position": decoder_around(rotary.ByPosition),
    "rotary of three axes": decoder_around(rotary.ThreeAxes),
    # scores
    "softcap and q/k norms": decoder_around(scores.SoftcapAndNorms),
    "sink column": decoder_around(scores.SinkColumn),
    "sinks as gates": decoder(
        lambda: Decoder(
            in_turn(*(partial(scores.SinkGate, by) for by in ("sigmoid", "the log of a sum", "keys first"))),
            num_layers=3,
        )
    ),
    "differential": decoder_around(scores.Differential),
    "temperature per head": decoder_around(scores.PerHeadTemperature),
    "temperatures of data": decoder(
        lambda: Decoder(
            in_turn(*(partial(scores.DataTemperature, of) for of in TEMPERATURES)), num_layers=len(TEMPERATURES)
        )
    ),
    # softmaxes and products by other means
    "softmax plus one": decoder_around(unusual_attention.OffByOneSoftmax),
    "softmaxes subtracted before the values": decoder_around(unusual_attention.Differential),
    "masked after the softmax": decoder_around(unusual_attention.MaskedAfterSoftmax),
    "masked exp": decoder_around(unusual_attention.MaskedExp),
    "scores times the mask": decoder_around(unusual_attention.MultipliedMask),
    "exp of log_softmax": decoder_around(unusual_attention.ExpOfLogSoftmax),
    "sink in the sum": decoder_around(softmaxes.SinkInTheSum),
    "sinks of merged heads": decoder_around(softmaxes.SinkOfMergedHeads),
    "sinks of merged heads, in the sum": decoder_around(softmaxes.SinkInTheSumOfMergedHeads),
    "log-sum-exp by hand": decoder_around(softmaxes.LogSumExpByHand),
    "products element by element": decoder_around(softmaxes.ElementwiseProducts),
    "zeroed after the softmax": decoder_around(softmaxes.ZeroedAfterTheSoftmax),
    "heads picked after the softmax": decoder(
        lambda: Decoder(in_turn(*(partial(picked.PickedHeads, by) for by in picked.WAYS)), num_layers=len(picked.WAYS))
    ),
    "little things": decoder_around(picked.LittleThings),
    "beside the cache": one_layer_around(picked.BesideTheCache),
    "head by head": decoder_around(softmaxes.HeadByHead),
    "flex_attention, ALiBi": decoder_around(softmaxes.FlexALiBi),
    "flex_attention, softcap and GQA": decoder_around(softmaxes.FlexSoftcapGQA),
    "nn.TransformerDecoder over its own embedding": decoder(softmaxes.TorchDecoderLayers),
    # blocks
    "experts, dense": decoder(lambda: Decoder(heads.RepeatInterleave, blocks.DenseExperts)),
    "experts, looped": decoder(lambda: Decoder(heads.RepeatInterleave, blocks.LoopedExperts)),
    "experts, split by sizes": decoder(lambda: Decoder(heads.RepeatInterleave, experts.SplitByExpert)),
    "experts, the best one": decoder(lambda: Decoder(heads.RepeatInterleave, experts.BestExpert)),
    "memory slots": decoder(lambda: Decoder(heads.RepeatInterleave, blocks.MemorySlots)),
    "squared ReLU": decoder(lambda: Decoder(heads.RepeatInterleave, blocks.SquaredReluMLP, num_layers=3)),
    "parallel block, interleaved partial rotary": decoder(blocks.ParallelDecoder),
    "one block run three times": decoder(blocks.UniversalDecoder),
    "keys and values shared across layers": decoder(blocks.CrossLayerSharing),
    "post-norm with the embedding mixed in": decoder(blocks.PostNormResidual),
    "values of the first layer mixed in": decoder(blocks.FirstValuesMixedIn),
    "two residual streams": decoder(blocks.TwoStreams),
    "batch norm in eval mode": decoder(lambda: Decoder(heads.RepeatInterleave, blocks.BatchNormInEval)),
    # forms
    "position_ids required": decoder(forms.AsksForPositions),
    "position_ids optional": decoder(forms.MayTakePositions),
    "returns an object": decoder(lambda: forms.ReturnsObject(heads.RepeatInterleave)),
    "returns a dict": decoder(lambda: forms.ReturnsDict(heads.RepeatInterleave)),
    "returns a tuple": decoder(lambda: forms.ReturnsTuple(heads.RepeatInterleave)),
    "the last token's logits": decoder(lambda: forms.TheLastUnlessTraining(heads.RepeatInterleave)),
    "keyword left alone": decoder(lambda: forms.OnlyTheLastWhenAsked(heads.RepeatInterleave)),
    # sizes
    "one layer": decoder(lambda: Decoder(heads.RepeatInterleave, lambda: GeluMLP(DIM, DIM), num_layers=1)),
}

UNUSUAL: dict[str, Builder] = {
    "sigmoid weights": decoder_around(unusual_attention.SigmoidWeights),
    "null key": decoder_around(unusual_attention.NullKey),
    "bias key of nn.MultiheadAttention": decoder_around(unusual_attention.BiasKeyOfTorch),
    "keys by distance": decoder_around(unusual_attention.KeysByDistance),
    "forget gates": decoder_around(unusual_attention.ForgetGates),
    "begins with a learned token": decoder(unusual_attention.BeginsWithALearnedToken),
}
