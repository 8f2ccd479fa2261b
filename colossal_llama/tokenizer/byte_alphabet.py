"""The printable characters by which byte-level BPE writes bytes, as GPT-2 introduced them.

The 188 bytes that are printable and no space in Latin-1 stand for themselves; the others, in rising order,
are written as the characters from U+0100 on.
"""

from __future__ import annotations

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in set(_PRINTABLE)]

CHARACTER_OF = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + index) for index, byte in enumerate(_OTHERS)
}
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}
# What is no character of the alphabet stays, or becomes, one that Latin-1 does not have.
_TO_LATIN_1 = dict.fromkeys(range(256), "\uffff") | {
    ord(character): chr(byte) for character, byte in BYTE_OF.items()
}


def byte_token(text: str) -> str:
    """The token that a text's UTF-8 bytes are written as.

    >>> byte_token(" 人")
    'Ġäºº'
    """
    return "".join(CHARACTER_OF[byte] for byte in text.encode("utf-8"))


def token_bytes(token: str) -> bytes:
    """The bytes that a token represents.

    Raises:
        KeyError: it is no byte-level token, but a special one for instance.
    """
    try:
        return token.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError as error:
        raise KeyError(token[error.start]) from None
