"""tokenizer.json, tokenizer_config.json, generation_config.json and the chat template of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

from tilewright.compiler.checkpoint import TokenizerFiles
from tilewright.compiler.errors import ModelError
from tilewright.compiler.frontends.stop_tokens import END_OF_TURN


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} where there is no such file. ModelError where it is something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); correct it or download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object; correct it or download it again")
    return value


def read_tokenizer(directory: Path, config: dict[str, Any]) -> TokenizerFiles | None:
    """The tokenizer in `directory`, whose config.json is `config`; None where there is no tokenizer.json."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    text = path.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: not a tokenizer that can be read ({error}); download it again") from error
    settings = read_json(directory / "tokenizer_config.json")
    bos = _content(settings.get("bos_token"))
    return TokenizerFiles(
        tokenizer_json=text,
        chat_template=_chat_template(directory, settings),
        bos_token=bos,
        eos_token=_content(settings.get("eos_token")),
        add_bos=_adds_bos(tokenizer, settings, bos),
        stop_token_ids=_stop_token_ids(directory, config, settings, tokenizer),
    )


def _content(token: Any) -> str | None:
    """A token as it is written: text, or an object with its "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the template of tokenizer_config.json; of several named ones, "default"."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _adds_bos(tokenizer: Any, settings: dict[str, Any], bos: str | None) -> bool:
    """What tokenizer_config.json says, else what the tokenizer does to an empty text."""
    if bos is None:
        return False
    stated = settings.get("add_bos_token")
    if stated is not None:
        return bool(stated)
    return tokenizer.token_to_id(bos) in tokenizer.encode("").ids[:1]


def _stop_token_ids(
    directory: Path, config: dict[str, Any], settings: dict[str, Any], tokenizer: Any
) -> tuple[int, ...]:
    """End-of-sequence ids of all three files, and the special tokens known to end a turn."""
    generation = read_json(directory / "generation_config.json")
    ids: set[int] = set()
    for value in (generation.get("eos_token_id"), config.get("eos_token_id")):
        ids |= set(value if isinstance(value, list) else [value]) - {None}
    eos = _content(settings.get("eos_token"))
    ids |= {tokenizer.token_to_id(eos)} - {None} if eos else set()
    ids |= {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.content in END_OF_TURN}
    return tuple(sorted(ids))
