"""The ``kvpass`` command: what it prints, its exit codes, and that nothing bad ends in a traceback."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kvpass
from kvpass import KvpassWarning
from kvpass.cli import main as cli
from kvpass.cli.main import app
from kvpass.models.pydecoder import CHECKPOINT, PyDecoder, PyDecoderConfig, save

SIZES = dict(d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24)
VOCABULARY = 40

MODELS = f"""
import torch
from torch import nn
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig


def build():
    torch.manual_seed(0)
    return PyDecoder(PyDecoderConfig(vocab_size={VOCABULARY}, **{SIZES}))


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding({VOCABULARY}, 8)
        self.head = nn.Linear(8, {VOCABULARY})

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


def fails():
    raise RuntimeError("no weights today")


def text():
    return "a model"


number = 7
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the command runs: a module with models, and folders of good and bad ones."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "cli_models.py").write_text(MODELS)
    (folder / "cli_broken.py").write_text("import cli_models\n\n1 / 0\n")
    (folder / "cli_leaves.py").write_text("raise SystemExit('not today')\n")
    (folder / "cli_needs.py").write_text("import nothing_of_this_name\n")
    torch.manual_seed(0)
    save(PyDecoder(PyDecoderConfig(**SIZES)), folder / "decoder")
    shutil.copy(CHECKPOINT / "tokenizer.json", folder / "decoder")
    for name, config in {
        "no-type": "{}",
        "no-json": "{",
        "no-object": "[]",
        "unknown": '{"model_type": "abacus"}',
        "no-weights": (folder / "decoder/config.json").read_text(),
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Run the command in ``folder``."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run_compiled(run, monkeypatch):
    """The same, with each model compiled at most once in all tests."""
    compile = kvpass.compile

    def compile_once(model, config, tokenizer=None):
        key = (type(model), sum(p.numel() for p in model.parameters()), config)
        if key not in ENGINES:
            ENGINES[key] = compile(model, config, tokenizer=tokenizer)
        return ENGINES[key]

    monkeypatch.setattr(kvpass, "compile", compile_once)
    return run


ENGINES = {}


def only_line(text):
    assert text.count("\n") == 1 and text.endswith("\n"), text
    return text


@pytest.mark.parametrize("arguments", [["--help"], [], ["generate", "-h"], ["inspect", "--help"]])
def test_help_is_printed(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 0
    assert "Usage: kvpass" in result.stdout.replace("root", "kvpass")


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(run, option):
    assert run(option).stdout == f"kvpass {kvpass.__version__}\n"


def test_python_runs_the_command():
    command = [sys.executable, "-m", "kvpass", "-V"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(kvpass.__file__).parents[1])
    assert ran.stdout == f"kvpass {kvpass.__version__}\n"


def test_env_says_what_serves(run):
    lines = run("env").stdout.splitlines()
    assert f"torch: {torch.__version__}" in lines and "backend reference: serves every device" in lines
    found = json.loads(run("env", "--json").stdout)
    assert {"processor", "CUDA devices", "backend cpu", "backend triton"} <= found.keys()


def test_generate_with_token_ids_prints_the_new_ids(run_compiled):
    result = run_compiled("generate", "--model", "cli_models:build", "--prompt", "3, 5 7", "-n", 6)
    assert (result.exit_code, result.stderr) == (0, "")
    tokens = [int(word) for word in only_line(result.stdout).split()]
    assert tokens == naive("cli_models", [3, 5, 7], 6)


def naive(module, prompt, count):
    model, ids = sys.modules[module].build().eval(), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
def test_generate_with_text_prints_text(run_compiled):
    arguments = ("generate", "--model", "decoder", "-p", "import os\n", "-p", "def f(x):\n", "-n", 5, "--seed", 1)
    result = run_compiled(*arguments, "--temperature", 1, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.01)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "[1] import os\n" in result.stdout and "[2] def f(x):\n" in result.stdout
    again = run_compiled(*arguments, "--temperature", 1, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.01)
    assert again.stdout == result.stdout


def test_generate_ends_before_a_stop_string(run_compiled):
    arguments = ("generate", "--model", "decoder", "-p", "def f(x):\n", "-n", 8)
    whole = run_compiled(*arguments).stdout
    stop = whole[3:6]
    result = run_compiled(*arguments, "--stop", "no such text", "--stop", stop)
    assert (result.exit_code, result.stdout) == (0, whole[: whole.index(stop)] + "\n")


def test_a_chat_goes_on_until_an_empty_line(run, monkeypatch):
    heard = []

    class Chatty:
        def stream_chat(self, messages, max_new_tokens, **options):
            heard.append([dict(message) for message in messages])
            assert (max_new_tokens, options) == (9, {"seed": 3})
            yield from ("one ", "two")

    monkeypatch.setattr(kvpass, "load", lambda model, config: Chatty())
    lines = iter(("hello", "more", ""))
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    result = run("chat", "--model", "FOLDER", "--system", "be short", "-n", 9, "--seed", 3)
    assert (result.exit_code, result.stdout) == (0, "one two\none two\n")
    first = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}]
    answered = [{"role": "assistant", "content": "one two"}, {"role": "user", "content": "more"}]
    assert heard == [first, first + answered]


def test_a_chat_without_a_template_says_so(run_compiled, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "hello")
    result = run_compiled("chat", "--model", "decoder")
    assert result.exit_code == 2 and "the tokenizer has no chat template" in only_line(result.stderr)


@pytest.mark.slow
def test_generate_with_a_transformers_folder(run_compiled, folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    shutil.copy(CHECKPOINT / "tokenizer.json", folder / "llama")
    result = run_compiled("generate", "--model", "llama", "--prompt", "import os", "-n", 3, "--ignore-eos")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.strip()


def test_inspect_prints_the_report(run_compiled):
    result = run_compiled("inspect", "--model", "cli_models:build")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "layers.0.attention" in result.stdout and "causal" in result.stdout and "verified decode" in result.stdout


def test_inspect_gives_the_report_as_json(run_compiled):
    result = run_compiled("inspect", "--model", "cli_models:build", "--json")
    report = json.loads(result.stdout)
    assert [site["module_path"] for site in report["sites"]] == ["layers.0.attention"]
    assert report["bytes_per_token"] == 2 * 8 * 4


def test_inspect_of_a_refused_model_says_why_and_exits_with_1(run):
    result = run("inspect", "--model", "cli_models:Mean")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "refused by" in result.stdout and "cumsum" in result.stdout
    assert "Traceback" not in result.stdout


def test_inspect_of_a_refused_model_gives_the_refusals_as_json(run):
    result = run("inspect", "--model", "cli_models:Mean", "--json")
    assert result.exit_code == 1
    assert any("cumsum" in refusal["reason"] for refusal in json.loads(result.stdout)["refusals"])


def test_generate_with_a_refused_model_writes_no_text(run):
    result = run("generate", "--model", "cli_models:Mean", "--prompt", "1 2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert all(line.startswith("refused: ") for line in result.stderr.splitlines())
    assert "cumsum" in result.stderr


BAD_MODELS = {
    "nowhere": "there is no folder nowhere: give a transformers folder",
    "some/where:build": "there is no folder some/where:build",
    "cli_models.py": "cli_models.py is a file: give the folder",
    "empty": "holds no config.json",
    "no-type": "no model_type",
    "no-json": "cannot be read as JSON",
    "no-object": "no JSON object",
    "no-weights": "weights in no-weights cannot be loaded",
    "unknown": "transformers cannot load the model in unknown",
    ":build": "write module:callable",
    "cli_models:": "write module:callable",
    "cli_nowhere:build": "there is no module cli_nowhere: run kvpass in the folder that holds it",
    "cli_models.deeper:build": "",
    "cli_needs:build": "importing cli_needs failed: ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "cli_broken:build": "importing cli_broken failed: ZeroDivisionError: division by zero (cli_broken.py, line 3)",
    "cli_leaves:build": "importing cli_leaves failed: SystemExit: not today",
    "cli_models:nothing": "cli_models has no nothing: name a function or class",
    "cli_models:number": "cli_models:number is a int: name a function or class",
    "cli_models:text": "cli_models:text() returned a str: it has to return a torch.nn.Module",
    "cli_models:fails": "cli_models:fails() failed: RuntimeError: no weights today (cli_models.py, line",
}


@pytest.mark.parametrize("model", BAD_MODELS)
@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_model_that_cannot_be_loaded_is_one_line(run, command, model):
    result = run(command, "--model", model, *(["--prompt", "1"] if command == "generate" else []))
    assert (result.exit_code, result.stdout) == (2, "")
    assert only_line(result.stderr).startswith("error: ")
    assert BAD_MODELS[model] in result.stderr


def test_a_transformers_folder_without_transformers_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("inspect", "--model", "unknown")
    assert result.exit_code == 2
    assert "pip install 'kvpass[transformers]'" in only_line(result.stderr)


BAD_OPTIONS = {
    "no token ids": (["--prompt", "import os"], "is no list of token ids: write it as 17,4,256"),
    "half a token id": (["--prompt", "1.5"], "is no list of token ids"),
    "empty prompt": (["--prompt", "1", "--prompt", ""], "prompt 2 is empty"),
    "id out of the vocabulary": (["--prompt", f"3 {VOCABULARY}"], f"ids are 0 to {VOCABULARY - 1}"),
    "negative id": (["--prompt", "-1"], "ids are 0 to"),
    "no new tokens": (["--prompt", "1", "-n", "0"], "--max-new-tokens"),
    "half a new token": (["--prompt", "1", "-n", "1.5"], "--max-new-tokens"),
    "unknown dtype": (["--prompt", "1", "--dtype", "int3"], "choose one of auto, float32"),
    "odd block size": (["--prompt", "1", "--block-size", "24"], "not a power of two"),
    "no memory": (["--prompt", "1", "--memory", "lots"], "write for example '512MiB'"),
    "too little memory": (["--prompt", "1", "--memory", "1KiB"], "holds no block"),
    "more tokens than memory": (["--prompt", "1", "-n", "90", "--memory", "4KiB"], ""),
    "negative temperature": (["--prompt", "1", "--temperature", "-1"], "temperature"),
    "top_p of two": (["--prompt", "1", "--top-p", "2"], "top_p"),
    "top_k below zero": (["--prompt", "1", "--top-k", "-2"], "top_k"),
    "min_p of two": (["--prompt", "1", "--min-p", "2"], "min_p"),
    "no tokenizer file": (["--prompt", "1", "--tokenizer", "nowhere.json"], "there is no tokenizer file nowhere.json"),
    "no tokenizer": (["--prompt", "1", "--tokenizer", "cli_models.py"], "is not a tokenizer.json"),
    "no prompt": ([], "Missing option '--prompt'"),
    "unknown option": (["--promt", "1"], "No such option"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_that_cannot_be_used_is_one_line(run_compiled, case):
    arguments, words = BAD_OPTIONS[case]
    result = run_compiled("generate", "--model", "cli_models:build", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert only_line(result.stderr).startswith("error: ")
    assert words in result.stderr


def test_an_unknown_command_is_one_line(run):
    result = run("regenerate")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Try 'root --help'" in only_line(result.stderr)


@pytest.mark.slow
def test_in_a_pipe_there_are_no_escape_codes(folder):
    command = [
        sys.executable,
        "-c",
        "from kvpass.cli.main import main; main()",
        "inspect",
        "--model",
        "cli_models:build",
    ]
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "PYTHONWARNINGS"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "layers.0.attention" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert not [row for row in done.stderr.splitlines() if "the backend cpu does not serve" not in row]


def test_what_kvpass_warns_of_is_one_line_and_what_others_do_is_none(monkeypatch, capsys):
    def command():
        for _ in range(2):
            warnings.warn("the kernels\nwere not built", KvpassWarning, stacklevel=1)
            warnings.warn("soon gone", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr(cli, "app", command)
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings():
        cli.main()
    assert capsys.readouterr() == ("", "warning: the kernels were not built\n")
