"""What a tokenizer's files say about it, and whether a model can have it."""

from pathlib import Path

from rlhf.config.json_file import ModelFileError, read_json
from rlhf.config.weight_files import Shapes

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
"""Ends of the names that token embeddings have."""


def require_tokenizer(folder: Path) -> None:
    """Raises ModelFileError if there is no tokenizer in the folder."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelFileError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}).")


def different_tokens(ours: Path, theirs: Path) -> tuple[int, int]:
    """How many of the token ids that both folders' tokenizers know stand for different text, and how many ids both
    know. Special tokens, which are often renamed, do not count.

    Raises:
        ModelFileError: there is no tokenizer.json, or it cannot be read.
    """
    one, other = (_tokens(folder / "tokenizer.json") for folder in (ours, theirs))
    shared = one.keys() & other.keys()
    return sum(one[token_id] != other[token_id] for token_id in shared), len(shared)


def _tokens(file: Path) -> dict[int, str]:
    """Id -> text of a tokenizer.json, without the special tokens. The list of a unigram model is in the order of its
    ids."""
    content = read_json(file)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        tokens = {i: str(entry[0]) for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    elif isinstance(vocabulary, dict):
        tokens = {token_id: text for text, token_id in vocabulary.items() if isinstance(token_id, int)}
    else:
        raise ModelFileError(f"{file}: no vocabulary in it.")
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("special") is True and isinstance(token.get("id"), int):
            tokens.pop(token["id"], None)
    return tokens


def require_rows(folder: Path, shapes: Shapes) -> None:
    """Raises ModelFileError if the tokenizer has ids for which the token embeddings have no row."""
    rows, name = max(
        ((shape[0], name) for name, shape in shapes.items() if name.endswith(EMBEDDINGS) and len(shape) == 2),
        default=(0, ""),
    )
    highest = max(_token_ids(folder), default=-1)
    if rows and highest >= rows:
        raise ModelFileError(
            f"{folder}: the tokenizer has ids up to {highest}, {name} has {rows} rows. Use the tokenizer that belongs "
            "to the model, or resize the embeddings."
        )


def _token_ids(folder: Path) -> set[int]:
    """The ids in tokenizer.json and tokenizer_config.json, as far as they can be read."""
    ids: set[int] = set()
    content = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        ids |= set(range(len(vocabulary)))
    elif isinstance(vocabulary, dict):
        ids |= {token_id for token_id in vocabulary.values() if isinstance(token_id, int)}
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            ids.add(token["id"])
    settings = folder / "tokenizer_config.json"
    decoder = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
    if isinstance(decoder, dict):
        ids |= {int(token_id) for token_id in decoder if token_id.isdecimal() and len(token_id) < 19}
    return ids
