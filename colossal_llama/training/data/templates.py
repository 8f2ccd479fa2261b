"""Which template the rows of a run are written in, as their parts say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from colossal_llama.conversation.carried import CarriedTemplate
from colossal_llama.dataset.bins import TEMPLATE_KEY
from colossal_llama.training.data.prepared_rows import PREPARED_FILE, PreparedDataset
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object


@dataclass(frozen=True)
class DataTemplate:
    """The template of all conversations of a run.

    Attributes:
        carried: as the parts describe it; None where it is not known, or there are no conversations.
        part: one of those that name it.
        is_tuning: whether there are conversations.
        unnamed: a part with conversations that names no template, if there is one.
    """

    carried: CarriedTemplate | None = None
    part: Path | None = None
    is_tuning: bool = False
    unnamed: Path | None = None

    def explain_kept(self) -> str:
        """Why the chat template of the source stays."""
        if not self.is_tuning:
            return "the data is for pre-training"
        if self.carried is None:
            return f"{self.unnamed} names no template; data prepared now does"
        if self.carried.name == "tokenizer":
            return "the data was prepared with --chat_template"
        return f"no chat template makes the rows of --template {self.carried.name} with this tokenizer"


def find_data_template(data: PreparedDataset, flag: str = "--dataset") -> DataTemplate:
    """The template of the parts, pre-training aside.

    Raises:
        UserError: there are two, or a part's description is damaged.
    """
    found: dict[CarriedTemplate, Path] = {}
    unnamed = None
    for path in data.paths:
        file = path / PREPARED_FILE
        prepared = read_json_object(file) if file.is_file() else {}
        if prepared.get("kind") == "pretrain":
            continue
        if TEMPLATE_KEY not in prepared:
            unnamed = unnamed or path
            continue
        try:
            found.setdefault(CarriedTemplate.from_json(prepared[TEMPLATE_KEY]), path)
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{file}: {TEMPLATE_KEY!r} is damaged; prepare the data again") from None
    if len(found) > 1:
        (one, one_path), (other, other_path) = list(found.items())[:2]
        same = " of another tokenizer" if one.name == other.name else ""
        raise UserError(
            f"{flag} {one_path}: was prepared with the template {one.name}, but {other_path} with "
            f"{other.name}{same}; a model is trained with one: prepare both with the same --template, "
            "--llama_version and tokenizer"
        )
    carried, part = next(iter(found.items()), (None, None))
    return DataTemplate(carried, part, bool(found) or unnamed is not None, unnamed)
