"""How fast are exported files beside the engine? Decode of one sequence, all taking turns in one run.

Each format's example decoder (the text of `run.py`) and the engine read a prompt of the model that comes with kvpass,
and go on with one token per step; a round of each in turn, medians over the rounds. The engine is stepped through
`generate`, with everything that it does for a request.

    python -m benchmarks.export_speed
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import kvpass
from kvpass.cli.terminal import output
from kvpass.exporters.examples import example_of
from kvpass.exporters.formats import FORMATS
from kvpass.loading import load_model
from kvpass.quality.measure import write_result


def decoder_of(format: str, folder: Path) -> Any:
    """The example decoder of an exported folder."""
    place: dict[str, Any] = {"__name__": "an_exported_step", "__file__": str(folder / "run.py")}
    exec(compile(example_of(format), "run.py", "exec"), place)
    return place["Decoder"](folder)


def decode(decoder: Any, prompt: list[int], tokens: int) -> float:
    """Seconds per token after the prompt."""
    sequence = decoder.start()
    logits = decoder.step([sequence], [prompt])
    began = time.perf_counter()
    for _ in range(tokens):
        logits = decoder.step([sequence], [[int(logits[0].argmax())]])
    spent = time.perf_counter() - began
    decoder.end(sequence)
    return spent / tokens


def decode_by_engine(engine: kvpass.Engine, prompt: list[int], tokens: int) -> float:
    """The same, between the first token and the last."""
    times: list[float] = []
    sampling = kvpass.Sampling(ignore_eos=True)
    engine.clear_prefix_cache()
    engine.generate([prompt], tokens + 1, sampling, on_token=lambda *_: times.append(time.perf_counter()))
    return (times[-1] - times[0]) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default 512)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded in a round (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="of each (default 5)")
    parser.add_argument("--formats", default=",".join(FORMATS), help="with commas between them")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    given = parser.parse_args()
    engine = kvpass.compile(load_model("pydecoder").model, kvpass.CacheConfig(num_blocks=64))
    prompt = [1 + i * 7 % 500 for i in range(given.prompt)]
    runs: dict[str, Callable[[], float]] = {"engine": lambda: decode_by_engine(engine, prompt, given.tokens)}
    with tempfile.TemporaryDirectory() as place:
        for format in given.formats.split(","):
            folder = Path(place) / format
            engine.export(folder, format, context=2048 if FORMATS[format].is_static else None, audit=False)
            decoder = decoder_of(format, folder)
            runs[format] = lambda decoder=decoder: decode(decoder, prompt, given.tokens)  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(given.rounds + 1):  # the first is a warm-up
            for name, run in runs.items():
                times[name].append(run())
    of_engine = median(times["engine"][1:])
    rows = []
    for name, found in times.items():
        spent = median(found[1:])
        rows.append({"format": name, "ms_per_token": spent * 1e3, "of_engine": of_engine / spent})
        output().print(f"{name:12} {spent * 1e3:7.2f} ms a token, {of_engine / spent:.2f} of the engine's speed")
    options = {name: getattr(given, name) for name in ("prompt", "tokens", "rounds")}
    write_result(given.results, "export_speed", {**options, "threads": torch.get_num_threads()}, rows)


if __name__ == "__main__":
    main()
