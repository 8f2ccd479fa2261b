"""What a tokenizer directory holds, read without transformers: kind, configuration, tokens and their ids."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import json_type, read_json, read_json_object

SENTENCEPIECE_FILE = "tokenizer.model"
FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
# Copied as they are when a tokenizer is extended.
SETTINGS_FILES = (
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    "chat_template.jinja",
    "chat_template.json",
)
TOKENIZER_FILES = (*SETTINGS_FILES, SENTENCEPIECE_FILE, FAST_FILE)

# transformers gives ids to special tokens that have none in this order (SpecialTokensMixin).
_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "additional_special_tokens",
)

_OTHER_FORM = "its added tokens are not written as transformers writes them; save the tokenizer again"


@dataclass
class TokenizerFiles:
    """A tokenizer directory's files; the large ones are read when they are first asked for.

    Attributes:
        directory: where they lie.
        config: `tokenizer_config.json`.
        special_tokens: `special_tokens_map.json`, empty without one.
    """

    directory: Path
    config: dict[str, Any]
    special_tokens: dict[str, Any]

    @property
    def is_sentencepiece(self) -> bool:
        return (self.directory / SENTENCEPIECE_FILE).exists()

    @cached_property
    def fast(self) -> dict[str, Any] | None:
        """`tokenizer.json`, None without one."""
        path = self.directory / FAST_FILE
        if not path.exists():
            return None
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise UserError(f"{path}: not a tokenizer of the tokenizers library (no model in it)")
        return content

    @cached_property
    def sentencepiece(self) -> Any:
        """`tokenizer.model` as a sentencepiece `ModelProto`."""
        return parse_sentencepiece(self.directory / SENTENCEPIECE_FILE)

    def added_tokens(self, vocabulary: Mapping[str, int]) -> dict[str, int]:
        """Every added token, special or not -> its id, the way transformers finds them.

        Args:
            vocabulary: token -> id of the model itself (sentencepiece, or `model.vocab` of `tokenizer.json`).

        Raises:
            UserError: two sources give one token different ids, or one id to different tokens.
        """
        ids: dict[str, int] = {}
        for origin, content, token_id in self._declared_added_tokens():
            if ids.setdefault(content, token_id) != token_id:
                raise UserError(
                    f"{self.directory / origin}: token {content!r} has id {token_id} here and {ids[content]} "
                    "in another file of the directory; save the tokenizer again with one id"
                )
        for content in self.special_token_strings():
            if content not in ids:
                ids[content] = vocabulary.get(content, max([len(vocabulary) - 1, *ids.values()]) + 1)
        token_at: dict[int, str] = {}
        for content, token_id in ids.items():
            if token_at.setdefault(token_id, content) != content:
                raise UserError(
                    f"{self.directory}: id {token_id} belongs to both {token_at[token_id]!r} and "
                    f"{content!r}; mend the added tokens"
                )
        return dict(sorted(ids.items(), key=lambda item: item[1]))

    def added_token_settings(self) -> dict[str, dict[str, Any]]:
        """Content -> lstrip, rstrip, single_word, normalized, special, where a file states them."""
        settings: dict[str, dict[str, Any]] = {}
        for name in _SPECIAL_TOKEN_NAMES:
            for value in (self.config.get(name), self.special_tokens.get(name)):
                for token in value if isinstance(value, list) else [value]:
                    if isinstance(token, dict) and "content" in token:
                        settings[token["content"]] = {**token, "special": True}
        for token in (self.config.get("added_tokens_decoder") or {}).values():
            settings[token["content"]] = token
        for token in (self.fast or {}).get("added_tokens", []):
            settings.setdefault(token["content"], token)
        return settings

    def special_token(self, name: str, default: str | None = None) -> str | None:
        """The string of `bos_token`, `eos_token`, …; the map goes before the configuration."""
        for place in (self.special_tokens, self.config):
            value = place.get(name)
            if value is not None:
                return value["content"] if isinstance(value, dict) else value
        return default

    def _declared_added_tokens(self) -> list[tuple[str, str, int]]:
        declared: list[tuple[str, str, int]] = []
        origin = CONFIG_FILE
        try:
            for key, token in (self.config.get("added_tokens_decoder") or {}).items():
                declared.append((origin, token["content"], int(key)))
            origin = ADDED_TOKENS_FILE
            if (self.directory / origin).exists():
                for content, token_id in read_json(self.directory / origin).items():
                    declared.append((origin, content, int(token_id)))
            origin = FAST_FILE
            for token in (self.fast or {}).get("added_tokens", []):
                declared.append((origin, token["content"], int(token["id"])))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{self.directory / origin}: {_OTHER_FORM}") from None
        return declared

    def special_token_strings(self) -> list[str]:
        found = []
        for name in _SPECIAL_TOKEN_NAMES:
            value = self.special_tokens.get(name, self.config.get(name))
            for token in value if isinstance(value, list) else [value]:
                content = token.get("content") if isinstance(token, dict) else token
                if isinstance(content, str) and content not in found:
                    found.append(content)
        return found


def read_tokenizer_files(directory: Path, flag: str) -> TokenizerFiles:
    """Opens a tokenizer directory.

    Args:
        flag: the command-line flag that named it, for the message.

    Raises:
        UserError: it holds no tokenizer.
    """
    missing = [] if (directory / CONFIG_FILE).exists() else [CONFIG_FILE]
    if not any((directory / name).exists() for name in (SENTENCEPIECE_FILE, FAST_FILE)):
        missing.insert(0, f"{SENTENCEPIECE_FILE} (LLaMA-2) or {FAST_FILE} (LLaMA-3)")
    if missing:
        raise UserError(f"{flag} {directory}: not a tokenizer directory, {' and '.join(missing)} missing")
    refuse_newer_settings(directory)
    contents = [
        read_json_object(directory / name) if (directory / name).exists() else {}
        for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE)
    ]
    return TokenizerFiles(directory, *contents)


def refuse_newer_settings(directory: str | Path) -> None:
    """Does nothing where `directory` is none, but the name of something on the hub for instance.

    Raises:
        UserError: it holds a tokenizer with damaged files, or with settings that transformers 4 can't load.
    """
    contents, problems = _read_settings(Path(directory))
    if problems:
        raise UserError(problems)
    path, config = Path(directory) / CONFIG_FILE, contents.get(CONFIG_FILE, {})
    if config.get("tokenizer_class") == "TokenizersBackend":
        problems.append(f"{path}: only transformers 5 knows TokenizersBackend; write PreTrainedTokenizerFast")
    if isinstance(config.get("extra_special_tokens"), list):
        problems.append(
            f"{path}: only transformers 5 takes a list of extra_special_tokens; call it "
            "additional_special_tokens"
        )
    if problems:
        raise UserError(problems)


def _read_settings(directory: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The small JSON files of a tokenizer by name, and what keeps the libraries from reading its files.

    Byte order marks are refused: transformers and vLLM do not take them, and tokenizer files are copied as
    they are into every model and checkpoint.
    """
    contents, problems = {}, []
    for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, FAST_FILE):
        path = directory / name
        if not path.is_file():
            continue
        with open(path, "rb") as file:
            has_mark = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        if has_mark:
            problems.append(
                f"{path}: begins with a byte order mark, which tokenizer libraries do not take; save it as "
                "UTF-8 without one"
            )
        elif name != FAST_FILE:  # large, and the library that reads it says what is wrong
            try:
                value = read_json(path)
            except UserError as error:
                problems += [f"{problem}; copy the tokenizer again" for problem in error.problems]
                continue
            if isinstance(value, dict):
                contents[name] = value
            elif name == ADDED_TOKENS_FILE:
                problems.append(f"{path}: {_OTHER_FORM}")
            else:
                problems.append(f"{path}: not a JSON object but {json_type(value)}; copy the tokenizer again")
    return contents, problems


def parse_sentencepiece(path: Path) -> Any:
    """Reads a sentencepiece model file into its `ModelProto`.

    Raises:
        UserError: it is something else, a tiktoken file for instance.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        model = None
    if model is None or not model.pieces:
        raise UserError(
            f"{path}: not a sentencepiece model. LLaMA-3 repositories keep a tiktoken file of this name: "
            "remove it from the directory and keep tokenizer.json"
        )
    return model
