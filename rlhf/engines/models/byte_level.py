"""Decoding of byte-level BPE, the tokenizers of most models since GPT-2, by a table: the text that the tokenizers
library gives, which looks up, copies and maps each token every time, for a fifth of the time."""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders

from rlhf.types import IntArray, TokenIds


def byte_alphabet() -> dict[str, int]:
    """Character -> the byte that it stands for (Radford et al. 2019): its own, or for those from 256 on one
    that is not printed."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


ALPHABET = byte_alphabet()


Pieces = npt.NDArray[np.object_]


def join(pieces: Pieces, ids: IntArray) -> str:
    """The text of the pieces with these indices. Raises IndexError or TypeError where one is not there."""
    return b"".join(pieces[ids].tolist()).decode(errors="replace")


class TokenBytes:
    """The bytes of each token, looked up when it comes for the first time."""

    def __init__(self, backend: tokenizers.Tokenizer, left_out: Collection[int] = ()) -> None:
        """`left_out` are decoded to nothing."""
        self._backend = backend
        self._left_out = frozenset(left_out)
        self._pieces: Pieces = np.empty(0, dtype=np.object_)
        """[largest id so far + 1]: the bytes of a token; None: not looked up yet."""

    def decode(self, token_ids: TokenIds) -> str:
        """The text of the tokens; U+FFFD where their bytes are no UTF-8."""
        ids = np.asarray(token_ids, dtype=np.int64)
        try:
            return join(self._pieces, ids)
        except (IndexError, TypeError):  # beyond the table, or None in it: cheaper than to look before each time
            return join(self._with(ids), ids)

    def _with(self, ids: IntArray) -> Pieces:
        """The table with these tokens. If threads look up others at the same time, only those of one are kept."""
        pieces = np.full(max(len(self._pieces), int(ids.max()) + 1), None, dtype=np.object_)
        pieces[: len(self._pieces)] = self._pieces
        for token_id in np.unique(ids).tolist():
            pieces[token_id] = self._bytes_of(token_id)
        self._pieces = pieces
        return pieces

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._left_out:
            return b""
        token = self._backend.id_to_token(token_id) or ""  # a model may have more tokens than its tokenizer
        is_made_of_bytes = all(character in ALPHABET for character in token)  # not so where it was added as a text
        return bytes(ALPHABET[character] for character in token) if is_made_of_bytes else token.encode()


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether a token's bytes do not depend on the tokens beside it, and are written in the alphabet."""
    return isinstance(backend.decoder, decoders.ByteLevel)


def special_ids(backend: tokenizers.Tokenizer) -> set[int]:
    """The tokens that are left out where special ones are."""
    return {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
