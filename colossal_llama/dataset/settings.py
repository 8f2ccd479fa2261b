"""What the user asked the prepare scripts for: one frozen object for each concern, every flag declared once.

Nothing heavy is imported here: `--help` has to answer in under a second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from colossal_llama.conversation import TEMPLATES
from colossal_llama.corpus.storage import is_url
from colossal_llama.dataset.encoders import LONG_DOCUMENTS
from colossal_llama.dataset.engines import ENGINES
from colossal_llama.utils.arguments import (
    MAX_ROW_TOKENS,
    directory_list,
    existing_directory,
    number,
    positive_int,
)
from colossal_llama.utils.settings import flag


def _input_list(text: str) -> list[Path | str]:
    """A comma list of existing directories, and of URLs, which nothing is asked for yet."""
    names = [name.strip().removeprefix("file://") for name in text.split(",")]
    local = ",".join(name for name in names if name and not is_url(name))
    directories = iter(directory_list(local)) if local or not any(names) else iter(())
    return [name if is_url(name) else next(directories) for name in names if name]


def _ray_address(text: str) -> str:
    if text in ("none", "local", "auto") or re.fullmatch(r"[^\s:]+:\d+", text):
        return text
    raise ValueError("choose from none, local, auto, HOST:PORT")


@dataclass(frozen=True)
class PathSettings:
    """Where records and the tokenizer are, and where the output goes."""

    data_input_dirs: list[Path | str] = flag(
        None,
        "comma list of directories with *.jsonl, *.jsonl.gz, *.jsonl.zst or *.parquet files, or URLs of "
        "such: s3://, gs://, hf://, https://, …",
        type=_input_list,
        required=True,
    )
    recursive: bool = flag(
        False, "read the directories below --data_input_dirs too; off: one that holds input is an error"
    )
    tokenizer_dir: Path = flag(
        None, "tokenizer in Hugging Face format", type=existing_directory, required=True
    )
    data_output_dirs: Path = flag(
        Path("data_output_dirs"), "directory for cache/, jsonl/, arrow/ and stats.json", type=Path
    )
    data_arrow_output_dir: Path | None = flag(
        None, "directory for the Arrow parts (default: <data_output_dirs>/arrow)", type=Path
    )
    overwrite: bool = flag(False, "replace output that is there")
    preview: int = flag(
        0,
        "number of rows that are shown in the terminal at the end: documents apart, what has loss marked, "
        "special tokens by name",
        type=number(int, 0),
    )

    @property
    def arrow_dir(self) -> Path:
        return self.data_arrow_output_dir or self.data_output_dirs / "arrow"

    @property
    def held_out_dir(self) -> Path:
        return self.data_output_dirs / "held_out"


@dataclass(frozen=True)
class RowSettings:
    """How documents are laid out in rows and bins."""

    max_length: int = flag(4096, "longest row, in tokens", type=number(int, 2, MAX_ROW_TOKENS))
    num_spliced_dataset_bins: int = flag(
        10, "number of bins (part directories), 1 to 99999", type=number(int, 1, 99999)
    )
    seed: int = flag(42, "seed of every random choice", type=number(int, 0, 2**31 - 1))
    on_bad_record: str = flag(
        "error",
        "malformed records: list them and stop, or count them and continue",
        choices=("error", "skip"),
    )
    held_out_share: float = flag(
        0.0,
        "share of the records, 0 to 0.9, that is kept out of training and written to "
        "<data_output_dirs>/held_out, as JSONL and as arrow/ for --eval_dataset; a hash of the text decides, "
        "so equal texts stay together",
        type=number(float, 0, 0.9),
    )


@dataclass(frozen=True)
class WorkerSettings:
    """Where the work runs; nothing here changes the output."""

    num_workers: int | None = flag(
        None,
        "processes that encode and pack, with Ray tasks at a time; the output does not depend on it "
        "(default: all cores)",
        type=positive_int,
    )
    ray_address: str = flag(
        "none",
        "where the work runs: none (this machine), local, auto or HOST:PORT of a Ray cluster",
        type=_ray_address,
    )
    tokenizer_engine: str = flag(
        "auto",
        "what encodes texts: hf (the tokenizers library), tuetoken (several times as fast; pip install "
        "tuetoken==0.1.3), or auto: tuetoken where it is installed. Its ids are compared with those "
        "of hf before and while it works; the output does not depend on the engine",
        choices=("auto", *ENGINES),
    )


class RecordSettings(Protocol):
    """What the settings of every kind of data set say.

    Attributes:
        encoder: the encoder, a name in `ENCODERS`.
        splice: pack several documents into a row.
    """

    @property
    def encoder(self) -> str: ...

    @property
    def splice(self) -> bool: ...

    def facts(self) -> dict[str, Any]:
        """What `stats.json` says of them; "kind" is one of the names."""


@dataclass(frozen=True)
class PretrainSettings:
    """Documents for pre-training."""

    encoder: ClassVar[str] = "pretrain"
    splice: ClassVar[bool] = True

    long_documents: str = flag(
        "chunk",
        "documents longer than --max_length: spread over several rows, or cut off",
        choices=tuple(LONG_DOCUMENTS),
    )
    text_field: str = flag(
        "",
        "the field that holds a record's text, all of which has loss; `category` is optional then "
        "(default: records with source, target and category)",
        type=str,
    )

    def facts(self) -> dict[str, Any]:
        facts = {"kind": "pretrain", "long_documents": self.long_documents}
        return {**facts, "text_field": self.text_field} if self.text_field else facts


@dataclass(frozen=True)
class SftSettings:
    """Conversations for supervised fine-tuning."""

    llama_version: int = flag(
        3, "turns end with </s> (2) or <|eot_id|> (3); with --template colossal", type=int, choices=(2, 3)
    )
    template: str = flag(
        "colossal",
        "form of the conversations: this suite's, or Meta's own of LLaMA-2 ([INST]) or LLaMA-3 (headers); "
        "training writes it into the model's tokenizer_config.json",
        choices=tuple(name for name in TEMPLATES if name != "tokenizer"),
    )
    splice: bool = flag(False, "pack several conversations into a row; off: one each")
    chat_template: bool = flag(False, "use the tokenizer's own chat template instead of the built-in one")

    @property
    def encoder(self) -> str:
        return "chat_template" if self.chat_template else "sft"

    def facts(self) -> dict[str, Any]:
        facts = {"kind": "sft", "template": "tokenizer" if self.chat_template else self.template}
        if facts["template"] == "colossal":
            facts["llama_version"] = self.llama_version
        return {**facts, "splice": self.splice}


@dataclass(frozen=True)
class PreparationSettings:
    """Everything that a prepare script was asked for."""

    records: RecordSettings
    paths: PathSettings
    rows: RowSettings = RowSettings()
    workers: WorkerSettings = WorkerSettings()

    @property
    def skip_bad_records(self) -> bool:
        return self.rows.on_bad_record == "skip"
