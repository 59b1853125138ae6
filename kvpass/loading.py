"""A model by its name: a folder, or an import path of something that gives a module.

Whatever cannot be used is an :class:`~kvpass.errors.InputError` of one line that says what to do.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from kvpass.errors import InputError
from kvpass.models import pydecoder, recall

SHIPPED_TEXT, SHIPPED_RECALL = "pydecoder", "recall"  # on the command line: the models that come with kvpass
SHIPPED = {SHIPPED_TEXT: pydecoder.CHECKPOINT, SHIPPED_RECALL: recall.CHECKPOINT}
FORMS = "a transformers folder, a folder like that of the shipped model, or module:callable"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode, and how text becomes its token ids.

    Attributes:
        name: as given on the command line.
        model: the module.
        tokenizer: None when prompts are token ids.
        stop_token_ids: ids that end a text, beside those that the model's own configuration names.
    """

    name: str
    model: nn.Module
    tokenizer: Tokenizer | None = None
    stop_token_ids: tuple[int, ...] = ()


def load_model(name: str, tokenizer_file: str | None = None) -> LoadedModel:
    """The model called ``name``: a shipped one (``pydecoder``, ``recall``), a folder, or ``module:callable``.

    Args:
        name: what to load.
        tokenizer_file: a ``tokenizer.json`` to use instead of the folder's.

    Raises:
        InputError: if there is no such model, or it cannot be loaded.
    """
    path = SHIPPED.get(name) or Path(name).expanduser()
    if path.is_dir():
        loaded = _load_folder(name, path)
    elif path.exists():
        raise InputError(f"{name} is a file: give the folder that holds the model, or module:callable")
    elif ":" in name and "/" not in name:
        loaded = LoadedModel(name, _call(name))
    else:
        raise InputError(f"there is no folder {name}: give {FORMS}")
    if tokenizer_file is not None:
        tokenizer = read_tokenizer(Path(tokenizer_file).expanduser())
        loaded = LoadedModel(loaded.name, loaded.model, tokenizer, loaded.stop_token_ids)
    loaded.model.eval()
    return loaded


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json``.

    Raises:
        InputError: if the file is none.
    """
    if not path.is_file():
        raise InputError(f"there is no tokenizer file {path}: give a tokenizer.json, or leave --tokenizer out")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises Exception itself
        raise InputError(f"{path} is not a tokenizer.json that the tokenizers library can read: {error}") from error


def encode_prompts(loaded: LoadedModel, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt: by the tokenizer, or the numbers in it where there is none.

    Raises:
        InputError: if a prompt has no tokens, or there is no tokenizer and it is not numbers.
    """
    return [_encode(loaded, prompt, number) for number, prompt in enumerate(prompts, 1)]


def _encode(loaded: LoadedModel, prompt: str, number: int) -> list[int]:
    if loaded.tokenizer is not None:
        ids: list[int] = loaded.tokenizer.encode(prompt).ids
    else:
        words = re.split(r"[,\s]+", prompt.strip(" []"))
        try:
            ids = [int(word) for word in words if word]
        except ValueError:
            raise InputError(
                f"{loaded.name} has no tokenizer and prompt {number} is no list of token ids: write it as 17,4,256 or "
                f"give --tokenizer FILE"
            ) from None
    if not ids:
        raise InputError(f"prompt {number} is empty: a model needs at least one token to continue")
    return ids


def _load_folder(name: str, folder: Path) -> LoadedModel:
    config = _read_config(folder)
    if config.keys() == {field.name for field in fields(pydecoder.PyDecoderConfig)}:
        return _load_pydecoder(name, folder)
    if "model_type" in config:
        return _load_transformers(name, folder)
    raise InputError(f"{folder / 'config.json'} has no model_type, as that of a transformers model would: give {FORMS}")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no config.json, so it is no model folder: give {FORMS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object: give {FORMS}")
    return config


def _load_pydecoder(name: str, folder: Path) -> LoadedModel:
    try:
        model = pydecoder.load(folder)
    except Exception as error:
        raise InputError(f"the weights in {folder} cannot be loaded: {_summary(error)}") from error
    tokenizer = _tokenizer_of(folder)
    end = None if tokenizer is None else tokenizer.token_to_id(pydecoder.END_OF_TEXT)
    return LoadedModel(name, model, tokenizer, () if end is None else (end,))


def _load_transformers(name: str, folder: Path) -> LoadedModel:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"{folder} is a transformers model, and transformers is not installed: pip install 'kvpass[transformers]'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # anything at all, from a missing file to a configuration that contradicts itself
        raise InputError(f"transformers cannot load the model in {folder}: {_summary(error)}") from error
    return LoadedModel(name, model, _tokenizer_of(folder))


def _tokenizer_of(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    return read_tokenizer(path) if path.is_file() else None


def chat_tokenizer(folder: Path) -> Any:
    """The tokenizer of a transformers model, which has its chat template; None where the folder holds none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"transformers cannot load the tokenizer in {folder}: {_summary(error)}") from error


def _call(name: str) -> nn.Module:
    """The module that ``module:callable`` gives; the working folder is importable."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{name!r} is no import path: write module:callable, for example my_model:build")
    if sys.path[:1] != [""]:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                f"there is no module {error.name}: run kvpass in the folder that holds it, or install it"
            ) from error
        raise InputError(f"importing {module_name} failed: {_summary(error)}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"importing {module_name} failed: {_summary_with_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{module_name} has no {attribute}: name a function or class that returns the model")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputError(f"{name} is a {type(found).__name__}: name a function or class that returns the model")
    try:
        model = found()
    except (Exception, SystemExit) as error:
        raise InputError(f"{name}() failed: {_summary_with_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}() returned a {type(model).__name__}: it has to return a torch.nn.Module")
    return model


def _summary(error: BaseException) -> str:
    """Kind and message of an error, in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _summary_with_line(error: BaseException) -> str:
    """The same, and the line of the user's own code that it came from."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__
        and not {"site-packages", "importlib"} & set(Path(frame.filename).parts)
        and not frame.filename.startswith("<frozen")
    ]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return _summary(error) + where
