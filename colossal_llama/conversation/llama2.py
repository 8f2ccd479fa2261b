"""Meta's own format of LLaMA-2's chat models: `[INST] … [/INST]`.

BOS  [INST] <<SYS>>\\nsystem\\n<</SYS>>\\n\\nHello [/INST] Hi!  EOS  BOS  [INST] Bye [/INST] See you  EOS
── no loss ──────────────────────────────────────────── ── loss ───      ── no loss ───── ── loss ─────
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colossal_llama.conversation.control_tokens import find_named_token
from colossal_llama.conversation.form import CONTENT, Form
from colossal_llama.conversation.template import TurnTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Llama2Template(TurnTemplate):
    """`[INST]` and `[/INST]` in plain text, BOS before each question and EOS after each answer."""

    @classmethod
    def describe(cls, tokenizer: PreTrainedTokenizerBase, llama_version: int | None = None) -> Form:
        bos, eos = (find_named_token(tokenizer, name) for name in ("bos_token", "eos_token"))
        return Form(
            name="llama2",
            system=f"<<SYS>>\n{CONTENT}\n<</SYS>>\n\n",
            system_inside=True,
            human=f"{bos}[INST] {CONTENT} [/INST]",
            header="",
            answer=f" {CONTENT} {eos}",
            end=eos,
            trims=True,
            alternates=True,
        )
