"""Whether transformers' tokenizer class of Qwen 2 and 3, which builds a tokenizer of its own from the vocabulary in
tokenizer.json, builds what the file holds."""

from collections.abc import Mapping

from rlhf.types import Json

CLASSES = frozenset({"Qwen2Tokenizer", "Qwen2TokenizerFast"})
DEFAULTS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
"""Special tokens of the class where tokenizer_config.json does not name them."""
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How the class cuts a text, before bytes are merged."""
SPLIT: Json = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
MERGES: Mapping[str, tuple[Json, ...]] = {
    "type": ("BPE",), "dropout": (None,), "unk_token": (None,), "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""), "fuse_unk": (False,), "byte_fallback": (False,), "ignore_merges": (False,),
}  # fmt: skip


def is_built_alike(content: Mapping[str, object], settings: Mapping[str, object]) -> bool:
    """Whether a tokenizer.json, with the settings beside it, holds what the class builds: the same steps, and added
    tokens, each in the settings' list too where there is one, with the ids behind the vocabulary's in their order."""
    model, added = content.get("model"), content.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list) or not _has_its_steps(content):
        return False
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or any(model.get(name) not in values for name, values in MERGES.items()):
        return False
    behind = sorted(token["id"] for token in added if token["content"] not in vocabulary)
    listed = settings.get("added_tokens_decoder")
    return (
        sorted(vocabulary.values()) == list(range(len(vocabulary)))
        and behind == list(range(len(vocabulary), len(vocabulary) + len(behind)))
        and all(vocabulary.get(token["content"], token["id"]) == token["id"] for token in added)
        and (not isinstance(listed, dict) or listed.keys() == {str(token["id"]) for token in added})
    )


def _has_its_steps(content: Mapping[str, object]) -> bool:
    cuts, decoder = content.get("pre_tokenizer"), content.get("decoder")
    if not isinstance(cuts, dict) or not isinstance(decoder, dict) or cuts.get("type") != "Sequence":
        return False
    steps = cuts.get("pretokenizers")
    if not isinstance(steps, list) or len(steps) != 2 or not isinstance(steps[1], dict):
        return False
    to_bytes = {name: steps[1].get(name) for name in ("type", "add_prefix_space", "use_regex")}
    return (
        content.get("normalizer") == {"type": "NFC"}
        and steps[0] == SPLIT
        and to_bytes == {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        and decoder.get("type") == "ByteLevel"
    )
