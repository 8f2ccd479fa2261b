"""The Rust library of Hugging Face, which made the file that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Encoding, Tokenizer


class TokenizersEngine:
    """`tokenizers`, without post-processor.

    That only adds special tokens and trims spaces from offsets; without it every character belongs to the
    token that it came from.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self.backend = Tokenizer.from_file(tokenizer_json)
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = None

    def encode(self, texts: Sequence[str]) -> Iterable[list[int]]:
        # One by one: as Python integers, the ids of a batch take more memory than its encodings.
        return (
            encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        )

    def encode_with_offsets(self, texts: Sequence[str]) -> Iterable[Encoding]:
        return self.backend.encode_batch(list(texts), add_special_tokens=False)
