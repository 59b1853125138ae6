"""The ``kvpass`` command; its commands are those of ``kvpass --help``.

Results go to standard output, everything else to standard error. The exit code is 0, 1 for a model that was refused,
or 2 for something that cannot be used; the latter two say why in one line each, and never with a traceback.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvpass.cli.chat_command import chat
from kvpass.cli.env_command import env
from kvpass.cli.export_command import audit, export
from kvpass.cli.plan_command import plan
from kvpass.cli.terminal import error_line, line, output, stages
from kvpass.cli.trace_command import trace
from kvpass.config import CACHE_DTYPES
from kvpass.errors import ConfigError, KvpassError, KvpassWarning, RefusedError

REFUSED, UNUSABLE, INTERRUPTED = 1, 2, 130
# typer exports none of the classes between BadParameter and Exception, and they are click's or its own by version.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class OneLineErrors(TyperGroup):
    """Commands whose errors are one line each."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command; standalone, as it is by default, the process ends with its exit code."""
        standalone = options.get("standalone_mode", True)
        options["standalone_mode"] = False
        if not standalone:
            return super().main(*args, **options)
        try:
            code = super().main(*args, **options)
        except RefusedError as error:
            for refusal in error.report.refusals:
                error_line(f"refused: {refusal}")
            if not error.report.refusals:
                error_line(f"refused: {error}")
            code = REFUSED
        except KvpassError as error:
            error_line(f"error: {error}")
            code = UNUSABLE
        except UsageError as error:
            error_line(f"error: {usage_message(error)}")
            code = UNUSABLE
        except (KeyboardInterrupt, typer.Abort):
            error_line("interrupted")
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=OneLineErrors,
    help="Run any PyTorch decoder with a paged KV cache that is proven equal to the original.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

MODEL_HELP = (
    "pydecoder or recall (the models that come with kvpass), the folder of a transformers model, or module:callable."
)

# What any heads can be stored in.
DEFAULT_FORMATS = ",".join(name for name in CACHE_DTYPES if name not in ("auto", "k4v2"))

Model = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)]
Dtype = Annotated[str, typer.Option(help=f"Format of keys and values: {', '.join(CACHE_DTYPES)}.")]
Formats = Annotated[str, typer.Option(help="Formats of the cache, with commas between them.")]
TextFile = Annotated[Path | None, typer.Option("--text", help="Text to measure on; shipped models bring their own.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of text that are read.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens of a window; none sees beyond its own.")]
Chunk = Annotated[int, typer.Option(min=1, help="Tokens of a text that are read in one step; 1 is decoding.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
BlockSize = Annotated[int, typer.Option(help="Tokens per block, a power of two.")]


app.command()(chat)
app.command()(env)
app.command()(export)
app.command()(audit)
app.command()(plan)
app.command()(trace)


@app.callback(invoke_without_command=True)
def show_help(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from kvpass import __version__

        typer.echo(f"kvpass {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo() -> None:
    """Rewrite the model that comes with kvpass, generate with it, and measure it beside two others."""
    from kvpass.cli.demo import run_shipped

    run_shipped(output())


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="Text to continue, or token ids as 17,4,256; may be repeated.")
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Most new tokens of each prompt.")
    ] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens with this probability together.")] = 1,
    top_k: Annotated[int, typer.Option(help="Choose among this many of the likeliest tokens; 0 for all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Choose among tokens this likely, relative to the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes the choice reproducible.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divide the scores of tokens that have occurred; 1 is off.")
    ] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken off the scores of new tokens that occur again.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time that they occur.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the text.")] = False,
    dtype: Dtype = "auto",
    block_size: BlockSize = 32,
    memory: Annotated[str, typer.Option(help="Memory of the cache, such as 512MiB.")] = "256MiB",
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json, instead of the one in the folder.")] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="Options of the cache as JSON, such as tune writes, before all others."),
    ] = None,
) -> None:
    """Continue prompts with a model that is rewritten to use a paged KV cache."""
    from kvpass import CacheConfig, Sampling, compile
    from kvpass.cli.text_stream import show_texts
    from kvpass.config import check_sampling
    from kvpass.config_file import read_options
    from kvpass.loading import encode_prompts, load_model

    given: dict[str, Any] = {} if config_file is None else read_options(config_file)
    cache_size = {} if "num_blocks" in given else {"memory": memory}
    config = CacheConfig(**{"dtype": dtype, "block_size": block_size, **cache_size, **given})
    sampling = Sampling(
        temperature,
        top_p,
        top_k,
        min_p,
        seed,
        ignore_eos=ignore_eos,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
    )
    check_sampling(sampling)
    loaded = load_model(model, tokenizer)
    ids = encode_prompts(loaded, prompt)
    sampling = replace(sampling, stop_token_ids=loaded.stop_token_ids)
    engine = compile(loaded.model, config, tokenizer=loaded.tokenizer)
    tokens = engine.stream(ids, max_new_tokens, sampling)
    show_texts(output(), prompt, ids, loaded.tokenizer, tokens, sampling)


@app.command()
def inspect(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    dtype: Dtype = "auto",
    block_size: BlockSize = 32,
) -> None:
    """Print what kvpass finds in a model: its attention and how it is cached, or why it is refused."""
    from kvpass import CacheConfig, compile
    from kvpass.loading import load_model

    config = CacheConfig(dtype=dtype, block_size=block_size, num_blocks=1)
    loaded = load_model(model)
    try:
        report = compile(loaded.model, config).report
    except RefusedError as error:
        report = error.report
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        output().print(report)
    if report.refusals or (report.verification is not None and not report.verification.passed):
        raise typer.Exit(REFUSED)


@app.command("eval")
def evaluate_formats(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", metavar="MODEL", help=f"{MODEL_HELP} Without it: both shipped.")
    ] = None,
    formats: Formats = DEFAULT_FORMATS,
    text: TextFile = None,
    config: Annotated[list[Path] | None, typer.Option(help="A file that tune wrote, to be measured as well.")] = None,
    tokens: Tokens = 16384,
    window: Window = 1024,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that prompts are continued by.")] = 384,
    chunk: Chunk = 32,
    as_json: AsJson = False,
) -> None:
    """Measure what each format of the cache costs in quality: perplexity, divergence, agreement, recall."""
    from kvpass.config_file import read_options
    from kvpass.loading import SHIPPED, load_model
    from kvpass.quality.eval_sets import EvalSizes, eval_sets
    from kvpass.quality.evaluate import evaluate
    from kvpass.quality.tables import quality_data, quality_table

    measured: dict[str, Any] = {name: name for name in split_names(formats)}
    for path in config or ():
        measured[str(path) if path.stem in measured else path.stem] = read_options(path).get("dtype", "auto")
    if not measured:
        raise ConfigError("no format is to be measured: name some in --formats, or a file in --config")
    sizes = EvalSizes(text_tokens=tokens, window=window, new_tokens=new_tokens)
    found = []
    for name in model or SHIPPED:
        loaded = load_model(name)
        sets = eval_sets(loaded, text, sizes)
        with stages() as stage:
            rows = evaluate(loaded.model, measured, sets.samples, sets.prompts, sizes.new_tokens, chunk, stage)
        found.append(quality_data(name, rows))
        if not as_json:
            output().print(quality_table(name, rows))
    if as_json:
        typer.echo(json.dumps(found, indent=2))


@app.command("tune")
def tune_formats(
    model: Model,
    budget: Annotated[str, typer.Option(help="Most that a token may take: 640 (bytes), or 5bits per stored number.")],
    formats: Formats = "bfloat16,int8,int4",
    text: TextFile = None,
    tokens: Tokens = 4096,
    window: Window = 512,
    chunk: Chunk = 32,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, for the --config of generate and eval.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the format of each layer's keys and values by what it costs in quality, under a budget of memory."""
    from kvpass.config_file import check_place, write_config
    from kvpass.loading import load_model
    from kvpass.quality.eval_sets import EvalSizes, eval_sets
    from kvpass.quality.tables import tuning_data, tuning_lines, tuning_table
    from kvpass.quality.tune import parse_budget, tune

    allowed = parse_budget(budget)
    if out is not None:
        check_place(out)
    loaded = load_model(model)
    sets = eval_sets(loaded, text, EvalSizes(text_tokens=tokens, window=window, task_rows=16))
    with stages() as stage:
        tuning = tune(loaded.model, sets.samples, split_names(formats), allowed, chunk, stage)
    if as_json:
        typer.echo(json.dumps(tuning_data(model, tuning), indent=2))
    else:
        output().print(tuning_table(model, tuning))
        for row in tuning_lines(tuning):
            line(output(), row)
    if out is not None:
        write_config(out, {"dtype": tuning.dtype})


def split_names(text: str) -> list[str]:
    """``"int8, int4"`` -> ``["int8", "int4"]``."""
    return [name for part in text.split(",") if (name := part.strip())]


def usage_message(error: Exception) -> str:
    """What is wrong with the command line, and where to read more."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "kvpass"
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return f"{text.rstrip('.')}. Try '{command} --help'"


def show_warning(message: Warning | str, *_: object) -> None:
    """Write a warning to standard error as one line."""
    error_line(f"warning: {message}", style="yellow")


def main() -> None:
    """Entry point of the ``kvpass`` command."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # other people's deprecations are not for the reader of a command's output
        warnings.simplefilter("default", KvpassWarning)
        warnings.showwarning = show_warning  # type: ignore[assignment]
    app()
