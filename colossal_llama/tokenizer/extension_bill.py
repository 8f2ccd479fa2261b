"""What an extension of the vocabulary buys and costs: a simple model, whose assumptions are printed.

For the same text, training computes `tokens x 6 x (parameters that multiply)`. An extension makes the first
factor smaller and the second one larger. Learning the new rows costs training on text until each has been
seen often enough; the saving of later tokens has to pay for that.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

from colossal_llama.utils.console import format_table
from colossal_llama.utils.llama_size import LlamaConfiguration, count_parameters, matrix_parameters

# What a new row has to be seen on average before it counts as learned; see `under_100` of stats.json.
OCCURRENCES_TO_LEARN = 100
ASSUMPTIONS = (
    "Assumed: all text is like this corpus; training costs 6 FLOPs for each token and parameter that",
    "multiplies (attention, which gets cheaper too, is not counted); new rows are learned when they have",
    f"occurred {OCCURRENCES_TO_LEARN} times on average, and the training until then does nothing else.",
)


@dataclass(frozen=True)
class ExtensionBill:
    """An extended vocabulary on a corpus, against its base.

    Attributes:
        base_tokens, tokens: of the corpus, without BOS and EOS.
        new_pieces: number of ids that the extension added.
        occurrences: of new pieces among the tokens.
        base_parameters, parameters: of both models.
        base_multiplied, multiplied: of these, all but an input embedding that is not tied.
    """

    base_tokens: int
    tokens: int
    new_pieces: int
    occurrences: int
    base_parameters: int
    parameters: int
    base_multiplied: int
    multiplied: int

    @property
    def saved_share(self) -> float:
        """Of the base's tokens."""
        return 1 - self.tokens / self.base_tokens

    @property
    def compute_share(self) -> float:
        """FLOPs for the same text, the base's as 1."""
        return self.tokens * self.multiplied / (self.base_tokens * self.base_multiplied)

    @property
    def learning_tokens(self) -> float | None:
        """Tokens of training until new pieces have been seen often enough; None where they never occur."""
        if not self.occurrences:
            return None
        return OCCURRENCES_TO_LEARN * self.new_pieces * self.tokens / self.occurrences

    @property
    def payback_tokens(self) -> float | None:
        """Tokens of training, after the learning, whose saving is what the learning cost; None for never."""
        saved = self.base_multiplied * self.base_tokens / self.tokens - self.multiplied  # for each token
        if self.learning_tokens is None or saved <= 0:
            return None
        return self.learning_tokens * self.multiplied / saved

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "saved_share": self.saved_share,
            "compute_share": self.compute_share,
            "learning_tokens": self.learning_tokens,
            "payback_tokens": self.payback_tokens,
        }


def make_bill(
    config: LlamaConfiguration,
    base_rows: int,
    rows: int,
    base_tokens: int,
    tokens: int,
    new_pieces: int,
    occurrences: int,
) -> ExtensionBill:
    """The bill of an extension from `base_rows` to `rows` rows of a model; its own number does not matter."""
    base, extended = (_with_rows(config, number) for number in (base_rows, rows))
    return ExtensionBill(
        base_tokens,
        tokens,
        new_pieces,
        occurrences,
        count_parameters(base),
        count_parameters(extended),
        matrix_parameters(base),
        matrix_parameters(extended),
    )


def _with_rows(config: LlamaConfiguration, rows: int) -> LlamaConfiguration:
    changed = copy.copy(config)
    changed.vocab_size = rows
    return changed


def describe_bill(bill: ExtensionBill) -> list[tuple[str, str]]:
    """The rows of a table."""
    added = bill.parameters - bill.base_parameters
    rows = [
        ("tokens of this corpus", f"{bill.tokens:,}, the base: {bill.base_tokens:,}"),
        ("tokens saved", f"{bill.saved_share:.1%}"),
        ("new pieces among the tokens", f"{bill.occurrences / bill.tokens:.1%}"),
        ("parameters", f"{bill.parameters:,} (+{added:,}, {added / bill.base_parameters:+.1%})"),
        ("FLOPs per token", f"{bill.multiplied / bill.base_multiplied - 1:+.1%}"),
        ("FLOPs for the same text", f"{bill.compute_share - 1:+.1%}"),
    ]
    if bill.learning_tokens is None:
        rows.append(("learning the new rows", "never: no new piece occurs"))
        return rows
    rows.append(("learning the new rows takes", f"{_about(bill.learning_tokens)} tokens"))
    paid = bill.payback_tokens
    if paid is None:
        rows.append(("paid for", "never: a token costs more than the saving"))
    else:
        # Generating or reading a token costs a third of training on it.
        rows.append(
            ("paid for after", f"{_about(paid)} tokens of training, or {_about(3 * paid)} of inference")
        )
    return rows


def format_bill(title: str, bill: ExtensionBill) -> str:
    return "\n".join([format_table(("extension", title), describe_bill(bill)), *ASSUMPTIONS])


def _about(tokens: float) -> str:
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if tokens >= size:
            return f"{tokens / size:,.3g} {name}"
    return f"{tokens:,.0f}"
