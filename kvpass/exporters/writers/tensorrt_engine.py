"""An engine of TensorRT for RTX, built ahead of time and without a GPU from an ONNX model in its dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpass.errors import VerificationError
from kvpass.exporters.dialects.contracts import Port
from kvpass.exporters.writers.onnx_file import MODEL_FILE
from kvpass.report import RewriteReport

ENGINE_FILE = "model.engine"
BATCH = 8  # rows of the largest batch that an engine is built for


def write_engine(folder: Path, inputs: Sequence[Port], context: int) -> None:
    """Build the engine of the model in ``folder``, for every GPU that TensorRT for RTX builds for by default.

    It has two profiles: steps of one token, and steps of up to ``context`` tokens.

    Raises:
        VerificationError: if the parser or the builder does not take the model, with what they say.
    """
    parsed = parse(folder)
    builder = parsed.builder
    config = builder.create_builder_config()
    for width in (1, context):
        profile = builder.create_optimization_profile()
        for port in inputs:
            least, most = ([_size(size, batch, w) for size in port.shape] for batch, w in ((1, 1), (BATCH, width)))
            profile.set_shape(port.name, least, most, most)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(parsed.network, config)
    if engine is None:
        raise _refused("no engine can be built of the model", parsed.errors)
    (folder / ENGINE_FILE).write_bytes(engine)


@dataclass(frozen=True)
class Parsed:
    """What TensorRT made of a model.

    Attributes:
        network: its layers.
        builder: what owns the network; what it logs goes to the logger.
        logger: kept, since the builder does not keep it.
        errors: messages of all errors so far.
    """

    network: Any
    builder: Any
    logger: Any
    errors: list[str]


def parse(folder: Path) -> Parsed:
    """The network that TensorRT makes of the model in ``folder``.

    Raises:
        VerificationError: if the parser does not take the model.
    """
    import tensorrt_rtx as trt

    class Errors(trt.ILogger):  # type: ignore[misc]
        """Prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.said.append(message)

    logger = Errors()
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / MODEL_FILE)):
        errors = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        raise _refused("its parser does not take the model", errors)
    return Parsed(network, builder, logger, logger.said)


def _size(size: int | str, batch: int, width: int) -> int:
    return size if isinstance(size, int) else {"batch": batch, "width": width}[size]


def _refused(what: str, errors: Sequence[str]) -> VerificationError:
    said = "; ".join(" ".join(error.split()) for error in errors)[:600]
    return VerificationError(f"TensorRT: {what}: {said}", RewriteReport())
