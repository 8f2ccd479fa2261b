"""What a tokenizer directory holds, read without transformers: kind, configuration, tokens and their ids."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from colossal_llama.utils.console import warn
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import (
    json_type,
    read_json,
    read_json_object,
    remove_name,
    with_filename_in_errors,
)

SENTENCEPIECE_FILE = "tokenizer.model"
FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
# Names of the new rows of a model and how they came about, written by init_tokenizer.py; it goes with the
# tokenizer through every stage.
REPORT_FILE = "vocabulary_extension.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
# What does not depend on the vocabulary, so an extended tokenizer has the source's.
SETTINGS_FILES = (
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    TEMPLATE_FILE,
    "chat_template.json",
)
TEMPLATES_DIRECTORY = "additional_chat_templates"
VOCABULARY_FILES = ("vocab.json", "merges.txt", SENTENCEPIECE_FILE, FAST_FILE)
PREFIX_SETTING = "add_prefix_space"

# transformers assigns ids to special tokens that have none in this order (SpecialTokensMixin).
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

    @property
    def legacy(self) -> bool:
        """transformers' `legacy`: on when the configuration does not say."""
        legacy = self.config.get("legacy")
        return True if legacy is None else bool(legacy)

    @property
    def fast_puts_prefix(self) -> bool:
        """Whether `tokenizer.json` puts a space before every text, or before those that start with none."""
        fast = self.fast or {}
        return any(
            step.get("type") == "Prepend" or step.get("prepend_scheme", "never") != "never"
            for step in [*steps_of(fast.get("normalizer")), *steps_of(fast.get("pre_tokenizer"))]
        )

    @property
    def has_harmful_null_prefix(self) -> bool:
        """Whether `"add_prefix_space": null` is stated, on which slow and fast tokenizer disagree.

        transformers' `save_pretrained` writes it, and with it earlier versions of this suite wrote it into
        every trained LLaMA-2: no setting to the fast tokenizer, "no prefix" to the slow one.
        """
        return (
            self.is_sentencepiece
            and PREFIX_SETTING in self.config
            and self.config[PREFIX_SETTING] is None
            and not self.legacy
            and self.fast_puts_prefix
        )

    def config_without_prefix_setting(self) -> bytes:
        """`tokenizer_config.json` without `add_prefix_space`, all else as it is."""
        config = {key: value for key, value in self.config.items() if key != PREFIX_SETTING}
        # Not by orjson: transformers' "no limit" of `model_max_length` has more than 64 bits.
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

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
                    f"{content!r}; fix the added tokens"
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


def settings_of(directory: Path) -> list[str]:
    """The settings in a tokenizer directory, chat templates and the tokenizer's own code included.

    Returns:
        Names relative to the directory, a template's as `additional_chat_templates/NAME.jinja`.
    """
    names = [name for name in SETTINGS_FILES if (directory / name).is_file()]
    names += _files_named(directory, f"{TEMPLATES_DIRECTORY}/*.jinja")
    # All code: what a module imports is not known without running it. transformers looks nowhere deeper.
    return names + _files_named(directory, "*.py")


def _files_named(directory: Path, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.glob(pattern) if path.is_file())


def files_of_tokenizer(directory: Path) -> list[str]:
    """Every file of the tokenizer in a directory, those first without which it can't be loaded.

    Wherever a tokenizer goes, these go byte for byte: `save_pretrained` would change what it does.

    Returns:
        Names relative to the directory, as of `settings_of`.
    """
    vocabulary = [name for name in (*VOCABULARY_FILES, REPORT_FILE) if (directory / name).is_file()]
    others = _files_named(directory, "tokenizer.*.json")  # for other versions of transformers
    return [*vocabulary, *others, *settings_of(directory)]


def read_tokenizer_contents(directory: Path) -> dict[str, bytes]:
    """Everything that a tokenizer is, to be written elsewhere: name -> bytes, in the order above.

    Only a setting that an earlier `save_pretrained` spoilt is taken out (see `has_harmful_null_prefix`).
    """
    contents = {name: (directory / name).read_bytes() for name in files_of_tokenizer(directory)}
    if CONFIG_FILE in contents:
        files = _open(directory)
        if files.has_harmful_null_prefix:
            contents[CONFIG_FILE] = files.config_without_prefix_setting()
    return contents


def with_chat_template(contents: Mapping[str, bytes], chat_template: str) -> dict[str, bytes]:
    """A tokenizer's files with another chat template: everything else in its configuration stays.

    Files of templates that would be taken in place of it are left out.
    """
    kept = {
        name: content
        for name, content in contents.items()
        if name != TEMPLATE_FILE and not name.startswith(f"{TEMPLATES_DIRECTORY}/")
    }
    config = json.loads(kept.get(CONFIG_FILE, b"{}")) | {"chat_template": chat_template}
    # Not by orjson: see `config_without_prefix_setting`.
    kept[CONFIG_FILE] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return kept


def is_extension(directory: Path) -> bool:
    """Whether the tokenizer in a directory was made by init_tokenizer.py, of any version."""
    path = directory / REPORT_FILE
    try:
        report = read_json(path) if path.is_file() else None
    except UserError:
        return False
    return isinstance(report, dict) and "counts" in report


def copy_tokenizer(source: Path, target: Path) -> None:
    """Makes the tokenizer in directory `target` the one in `source`, byte for byte; other files stay."""
    contents = read_tokenizer_contents(source)
    stale = [name for name in files_of_tokenizer(target) if not name.endswith(".py")]  # code may be a model's
    for name in {*stale, *contents}:
        remove_name(target, name)
    for name, content in contents.items():
        with with_filename_in_errors(target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)


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
    _refuse_newer_settings(directory)
    return _open(directory)


def _open(directory: Path) -> TokenizerFiles:
    contents = [
        read_json_object(directory / name) if (directory / name).exists() else {}
        for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE)
    ]
    return TokenizerFiles(directory, *contents)


def check_settings(directory: str | Path) -> None:
    """The checks that every program makes before transformers loads a tokenizer.

    Warns of a setting on which slow and fast tokenizer disagree (see `has_harmful_null_prefix`). Does nothing
    where `directory` is none, but the name of something on the hub for instance.

    Raises:
        UserError: it holds a tokenizer with damaged files, or with settings that transformers 4 can't load.
    """
    _refuse_newer_settings(Path(directory))
    if not (Path(directory) / CONFIG_FILE).is_file():
        return
    files = _open(Path(directory))
    if files.has_harmful_null_prefix:
        warn(
            f'{files.directory / CONFIG_FILE}: "{PREFIX_SETTING}": null makes transformers\' slow tokenizer '
            "encode every text otherwise than the fast one, which is used here (earlier versions of this "
            "suite wrote it); remove this setting, as training and init_tokenizer.py do in what they write"
        )


def _refuse_newer_settings(directory: Path) -> None:
    contents, problems = _read_settings(directory)
    if problems:
        raise UserError(problems)
    path, config = directory / CONFIG_FILE, contents.get(CONFIG_FILE, {})
    if config.get("tokenizer_class") == "TokenizersBackend":
        problems.append(f"{path}: only transformers 5 knows TokenizersBackend; write PreTrainedTokenizerFast")
    if isinstance(config.get("extra_special_tokens"), list):
        problems.append(
            f"{path}: only transformers 5 takes a list of extra_special_tokens; call it "
            "additional_special_tokens"
        )
    if problems:
        raise UserError(problems)


def steps_of(component: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, those of sequences one by one."""
    if not component:
        return []
    if component.get("type") == "Sequence":
        parts = component.get("pretokenizers") or component.get("normalizers") or []
        return [step for part in parts for step in steps_of(part)]
    return [component]


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
        elif name != FAST_FILE:  # large, and the library that reads it reports what is wrong
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
