"""Kinds of tokenizers that put spaces each its own way; `conftest.py` makes them."""

KINDS = (
    "llama2",  # legacy: false, tokenizer.model alone
    "llama2 extended",
    "llama2 words",  # with ordinary added tokens
    "llama2 extended words",
    "legacy",
    "legacy extended",
    "prepend",  # a tokenizer.json that puts a space before every stretch, with legacy: false
    "first version",  # as init_tokenizer.py of the first version extended legacy: false
    "llama3",
    "llama3 words",
)
