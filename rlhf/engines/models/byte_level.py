"""Decoding of byte-level BPE, the tokenizers of most models since GPT-2, by a table: the text that the tokenizers
library gives, which looks up, copies and maps each token every time, for a fifth of the time."""

from collections.abc import Collection, Sequence

import tokenizers
from tokenizers import decoders


def byte_alphabet() -> dict[str, int]:
    """Character -> the byte that it stands for (Radford et al. 2019): its own, or for those from 256 on one
    that is not printed."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


ALPHABET = byte_alphabet()


class TokenBytes(dict[int, bytes]):
    """Token id -> its bytes, filled in when a token comes for the first time."""

    def __init__(self, backend: tokenizers.Tokenizer, left_out: Collection[int] = ()) -> None:
        """`left_out` are decoded to nothing."""
        super().__init__(dict.fromkeys(left_out, b""))
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""  # a model may have more tokens than its tokenizer
        is_made_of_bytes = all(character in ALPHABET for character in token)  # not so where it was added as a text
        found = bytes(ALPHABET[character] for character in token) if is_made_of_bytes else token.encode()
        self[token_id] = found
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens; U+FFFD where their bytes are no UTF-8."""
        return b"".join(map(self.__getitem__, token_ids)).decode(errors="replace")


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether a token's bytes do not depend on the tokens beside it, and are written in the alphabet."""
    return isinstance(backend.decoder, decoders.ByteLevel)


def special_ids(backend: tokenizers.Tokenizer) -> set[int]:
    """The tokens that are left out where special ones are."""
    return {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
