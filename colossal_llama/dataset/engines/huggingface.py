"""The Rust library of Hugging Face, which made the file that it reads: the reference for all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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

    def encode_with_borders(
        self, texts: Sequence[str], positions: Sequence[int]
    ) -> Iterator[tuple[list[int], int]]:
        """See `TextEncoder`; offsets cost a part of the speed."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        for encoding, position in zip(encodings, positions, strict=True):
            yield encoding.ids, count_before(encoding, position)


def count_before(encoding: Encoding, position: int) -> int:
    """The number of tokens before the first one that ends beyond the first `position` characters.

    When no token does (the text is no longer, or the normaliser removed the rest), the number of tokens.
    """
    index = encoding.char_to_token(position)
    if index is not None:
        return index
    return next((i for i, (_, end) in enumerate(encoding.offsets) if end > position), len(encoding))
