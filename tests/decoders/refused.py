"""Models that must be refused: each mixes tokens in a way that no cache of keys and values reproduces.

`REFUSED` gives for each a builder, a pattern that the refusal's reason must match (case ignored), and the path of the
module at fault; empty where the capture itself pins the length or finds state, and nobody can name a module.
"""

from functools import partial
from typing import NamedTuple

from torch import nn

from tests.decoders import layouts, padding, prefix, rotary, scores
from tests.decoders import unsound_attention as attention
from tests.decoders import unsound_mixing as mixing
from tests.decoders.skeleton import Builder, Decoder, decoder, in_turn, one_layer_around


class Expected(NamedTuple):
    """A model and what its refusal must say."""

    build: Builder
    words: str
    module_path: str


def after_attention(make_mixer: type[nn.Module]) -> Builder:
    """A decoder with sound attention in its first layer and the given mixer in its second."""
    return decoder(lambda: Decoder(in_turn(attention.CausalHeads, make_mixer)))


FIRST, SECOND = "layers.0.mixer", "layers.1.mixer"
AHEAD = r"causal|ahead|later|future"
LENGTH = r"length|number of tokens|shape"
TIME = r"token|time|position"
VIEW = r"view|reshape|" + TIME
LAST = r"slice|select|last|" + TIME

REFUSED: dict[str, Expected] = {
    "encoder without a mask": Expected(one_layer_around(attention.NoMask), AHEAD, FIRST),
    "encoder without a mask, softmax": Expected(one_layer_around(attention.NoMaskSoftmax), AHEAD, FIRST),
    "sinks of the wrong heads": Expected(one_layer_around(attention.SinkOfTheWrongHead), "the column of sinks", FIRST),
    "mask one token ahead": Expected(one_layer_around(attention.OneAhead), AHEAD, FIRST),
    "mask one token ahead after twenty": Expected(one_layer_around(attention.OneAheadAfterTwenty), AHEAD, FIRST),
    "nn.TransformerEncoder, a mask one token ahead": Expected(
        decoder(lambda: layouts.TorchStack(decoder=False, ahead=1)), AHEAD, "stack.layers.0"
    ),
    "nn.TransformerDecoder, masks one token ahead": Expected(
        decoder(lambda: layouts.TorchStack(decoder=True, ahead=1)), AHEAD, "stack.layers.0"
    ),
    "one head of four ahead": Expected(one_layer_around(attention.OneHeadAhead), AHEAD, FIRST),
    "prefix seen by all, with ALiBi": Expected(
        one_layer_around(attention.PrefixWithALiBi), r"prefix|see one another", FIRST
    ),
    "prefix of half the length": Expected(one_layer_around(partial(prefix.Prefix, "half")), r"see one another", FIRST),
    "prefixes of two lengths": Expected(
        decoder(lambda: Decoder(in_turn(prefix.Prefix, partial(prefix.Prefix, "added, of eleven")))),
        r"not the same",
        FIRST,
    ),
    "each token sees later ones only": Expected(one_layer_around(attention.OnlyLater), AHEAD, FIRST),
    "mask of -1000": Expected(one_layer_around(attention.SoftMask), AHEAD + r"|mask|bias", FIRST),
    "window of half the length": Expected(one_layer_around(attention.LengthDependentWindow), LENGTH + r"|mask", FIRST),
    "mask by token value": Expected(decoder(attention.MasksAToken), r"token value|token id|data|input", "attention"),
    "positions by token value": Expected(decoder(padding.RealTokensOnly), r"cumsum|cumulative", ""),
    "rotary switched by the length": Expected(one_layer_around(rotary.SwitchedByLength), LENGTH + r"|" + TIME, FIRST),
    "rotary stretched by the length": Expected(one_layer_around(rotary.StretchedByLength), LENGTH + r"|" + TIME, ""),
    "mask by hidden state": Expected(
        one_layer_around(attention.MaskFromHiddenState), r"value|data|hidden|mask|attention", FIRST
    ),
    "keys chosen by data": Expected(one_layer_around(attention.ChosenKeys), r"top-?k|data|value|mask|attention", FIRST),
    "softmax over queries": Expected(one_layer_around(attention.SoftmaxOverQueries), r"softmax|quer", FIRST),
    "scale by length": Expected(one_layer_around(attention.ScaleByLength), LENGTH + r"|scale", FIRST),
    "queries scaled by log length": Expected(one_layer_around(attention.LogLengthScale), LENGTH + r"|scale", ""),
    "temperature of data after the mask": Expected(
        one_layer_around(partial(scores.DataTemperature, "query after the mask")), r"after their mask", FIRST
    ),
    "bias of a key by data": Expected(one_layer_around(partial(scores.DataTemperature, "bias")), r"data", FIRST),
    "weights times a function of the scores": Expected(
        one_layer_around(partial(scores.DataTemperature, "weights by the scores")), r"another tensor over keys", FIRST
    ),
    "talking heads": Expected(one_layer_around(attention.TalkingHeads), r"head|score|softmax|attention", FIRST),
    "keys flipped in time": Expected(one_layer_around(attention.FlippedKeys), r"flip|order|" + TIME, FIRST),
    "keys of the token before": Expected(one_layer_around(attention.ShiftedKeys), r"pad|slice|shift|" + TIME, FIRST),
    "every second key": Expected(one_layer_around(attention.EverySecondKey), r"slice|" + TIME, FIRST),
    "attention across the batch": Expected(one_layer_around(attention.AcrossTheBatch), r"batch|tokens", FIRST),
    "linear attention": Expected(one_layer_around(attention.LinearAttention), r"cumsum|cumulative", FIRST),
    "attention without softmax": Expected(one_layer_around(attention.NoSoftmax), TIME + r"|softmax|matmul", FIRST),
    "dropout left on": Expected(one_layer_around(attention.DropoutLeftOn), r"dropout|random", FIRST),
    "causal convolution": Expected(after_attention(mixing.CausalConvolution), r"conv", SECOND),
    "convolution on padded tokens": Expected(after_attention(mixing.PaddedConvolution), r"pad|conv", SECOND),
    "cumulative mean": Expected(after_attention(mixing.CumulativeMean), r"cumsum|cumulative", SECOND),
    "token shift": Expected(after_attention(mixing.TokenShift), r"cat|slice|shift|" + TIME, SECOND),
    "tokens rolled": Expected(after_attention(mixing.RolledTokens), r"roll|" + TIME, SECOND),
    "recurrence": Expected(after_attention(mixing.Recurrence), r"gru|recurren|rnn|" + LENGTH, ""),
    "mean of all tokens": Expected(after_attention(mixing.MeanOfAllTokens), r"mean", SECOND),
    "norm over time": Expected(after_attention(mixing.NormOverTime), r"mean|var|norm", SECOND),
    "mean over the batch": Expected(after_attention(mixing.MeanOverBatch), r"batch|mean", SECOND),
    "causal matrix over time": Expected(after_attention(mixing.MixesByMatrix), r"matmul|mm|" + TIME, SECOND),
    "noise per token": Expected(after_attention(mixing.NoisePerToken), r"rand", SECOND),
    "place relative to the length": Expected(after_attention(mixing.RelativePlace), LENGTH + r"|position", SECOND),
    "place counted from the end": Expected(after_attention(mixing.CountsFromTheEnd), LENGTH + r"|position", SECOND),
    "state kept in a buffer": Expected(after_attention(mixing.KeepsState), r"buffer|state|mutat|in.place|mean", ""),
    "last token everywhere": Expected(after_attention(mixing.LastTokenEverywhere), LAST, SECOND),
    "token before by index": Expected(after_attention(mixing.ShiftedByIndex), r"index|" + TIME, SECOND),
    "view instead of transpose": Expected(after_attention(mixing.ViewInsteadOfTranspose), VIEW, SECOND),
    "sliding sum by unfold": Expected(after_attention(mixing.SlidingSum), r"pad|unfold|" + TIME, SECOND),
    "group norm over time": Expected(after_attention(mixing.GroupNormOverTime), r"norm|" + TIME, SECOND),
    "unit length over time": Expected(after_attention(mixing.UnitLengthOverTime), r"norm|" + TIME, SECOND),
    "softmax over time": Expected(after_attention(mixing.SoftmaxOverTime), r"softmax", SECOND),
    "largest so far": Expected(after_attention(mixing.LargestSoFar), r"cummax|cumulative", SECOND),
    "largest of all": Expected(after_attention(mixing.LargestOfAll), r"max", SECOND),
    "sorted tokens": Expected(after_attention(mixing.SortedTokens), r"sort", SECOND),
    "Fourier over time": Expected(after_attention(mixing.FourierOverTime), r"fft", SECOND),
    "pooled tokens": Expected(after_attention(mixing.PooledTokens), r"pad|pool", SECOND),
    "experts choose tokens": Expected(after_attention(mixing.ExpertsChooseTokens), r"top-?k|sort|" + TIME, SECOND),
    "experts with a capacity": Expected(after_attention(mixing.ExpertsWithCapacity), r"cumsum|cumulative", SECOND),
}
