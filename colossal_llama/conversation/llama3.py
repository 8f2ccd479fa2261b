"""Meta's own format of LLaMA-3's chat models: a header with the role, and `<|eot_id|>` behind each message.

BOS  <|start_header_id|>  user  <|end_header_id|>  \\n\\nHello  <|eot_id|>
     <|start_header_id|>  assistant  <|end_header_id|>  \\n\\nHi!  <|eot_id|>
     ── no loss ───────────────────────────────────────────── ── loss ────
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colossal_llama.conversation.control_tokens import find_control_token, find_named_token
from colossal_llama.conversation.form import CONTENT, Form
from colossal_llama.conversation.template import TurnTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START_HEADER, END_HEADER, END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


class Llama3Template(TurnTemplate):
    """Headers between special tokens; every message ends with `<|eot_id|>`."""

    @classmethod
    def describe(cls, tokenizer: PreTrainedTokenizerBase, llama_version: int | None = None) -> Form:
        bos = find_named_token(tokenizer, "bos_token")
        for token in (START_HEADER, END_HEADER, END):
            find_control_token(tokenizer, token, "llama3")
        system, human, header = (
            f"{START_HEADER}{role}{END_HEADER}\n\n" for role in ("system", "user", "assistant")
        )
        return Form(
            name="llama3",
            opening=bos,
            system=f"{system}{CONTENT}{END}",
            human=f"{human}{CONTENT}{END}",
            header=header,
            answer=f"{CONTENT}{END}",
            end=END,
            trims=True,
        )
