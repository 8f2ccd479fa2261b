"""How a source tokenizer writes the tokens of an extended one: what new embeddings are averaged over."""

from __future__ import annotations

from collections.abc import Sequence

from colossal_llama.tokenizer.tokenizer_files import TokenizerFiles


def token_table(files: TokenizerFiles) -> dict[int, str]:
    """id -> token, for every id that means something: pieces, special tokens, added tokens."""
    if files.is_sentencepiece:
        vocabulary = {piece.piece: index for index, piece in enumerate(files.sentencepiece.pieces)}
    else:
        vocabulary = files.fast["model"]["vocab"]
    table = {token_id: token for token, token_id in vocabulary.items()}
    table.update({token_id: token for token, token_id in files.added_tokens(vocabulary).items()})
    return table


def encode_tokens(source: TokenizerFiles, tokens: Sequence[str]) -> list[list[int]]:
    """Ids in the source tokenizer of each token's own text, with no dummy-prefix space and no special tokens.

    Args:
        source: the tokenizer to encode with.
        tokens: in the spelling of the vocabulary: with `▁` for sentencepiece, with one printable character
            for each byte for byte-level BPE.
    """
    if source.is_sentencepiece:
        return _encode_pieces(source, tokens)
    return _encode_byte_level(source, tokens)


def _encode_pieces(source: TokenizerFiles, pieces: Sequence[str]) -> list[list[int]]:
    from sentencepiece import SentencePieceProcessor

    proto = type(source.sentencepiece)()
    proto.CopyFrom(source.sentencepiece)
    proto.normalizer_spec.add_dummy_prefix = False
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor.encode(list(pieces))


def _encode_byte_level(source: TokenizerFiles, tokens: Sequence[str]) -> list[list[int]]:
    """Whole texts go through the source's pre-tokenizer; a token that is part of a character does not."""
    from tokenizers import Tokenizer

    from colossal_llama.tokenizer.byte_alphabet import token_bytes

    whole = Tokenizer.from_file(str(source.directory / "tokenizer.json"))
    whole.encode_special_tokens = True
    whole.no_truncation()
    whole.no_padding()
    encodings = []
    for token in tokens:
        try:
            text = token_bytes(token).decode("utf-8")
        except (KeyError, UnicodeDecodeError):
            encodings.append([item.id for item in whole.model.tokenize(token)])
        else:
            encodings.append(whole.encode(text, add_special_tokens=False).ids)
    return encodings
