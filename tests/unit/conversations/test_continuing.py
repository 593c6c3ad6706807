"""The tokens of a continuation: never those of a text that begins something."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rlhf.conversations.continuing import continued, up_to_stop

LETTERS = ["<unk>", "▁", *"abcdefghij0123456789.:?", "\n", "▁a", "a:", "b:", ":1"]


def prefixing(scheme: str) -> Tokenizer:
    """A tokenizer that begins every text with a space, as those made by SentencePiece do."""
    merges = [("▁", "a"), ("a", ":"), ("b", ":"), (":", "1")]
    backend = Tokenizer(
        models.BPE(vocab={token: n for n, token in enumerate(LETTERS)}, merges=merges, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    return backend


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize(
    ("before", "text"), [("b:", "12"), ("a:", "2"), ("c", "a b"), ("b", ":1"), ("c:", "1"), ("b\n", "\nb")]
)
def test_a_continuation_never_begins_with_the_space_of_a_beginning(scheme: str, before: str, text: str) -> None:
    backend = prefixing(scheme)

    def encode(given: str) -> list[int]:
        return list(backend.encode(given, add_special_tokens=False).ids)

    tokens = [LETTERS[token] for token in continued(encode, before, text)]
    assert "".join(tokens).replace("▁", " ") == text


def test_a_text_whose_beginning_merges_with_everything_is_encoded_alone() -> None:
    assert continued(lambda text: [len(text)], "ab", "cd") == [2]


def test_an_answer_ends_at_its_first_stop_token() -> None:
    assert up_to_stop([5, 3, 7, 3], {3}) == 2
    assert up_to_stop([5, 7], {3}) == 2
    assert up_to_stop([], {3}) == 0
