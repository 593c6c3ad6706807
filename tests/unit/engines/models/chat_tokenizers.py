"""Byte-level tokenizers around chat templates: those that installed libraries ship, and any other."""

import ast
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKS = re.compile(
    r"<[|\uff5c][^<>{}\s]+?[|\uff5c]>|</?s>|<(?:start|end)_of_(?:turn|utterance)>|<eos>|\[/?[A-Z_]{3,}\]|<\|[^<>{}\s|]+>|<[^<>{}\s|]+\|>"
)
"""What looks like a special token in a template's text."""


def shipped_templates() -> dict[str, str]:
    """The chat templates of the libraries for chat models that are installed, by package and name."""
    found: dict[str, str] = {}
    for package, folder in (("trl", "chat_templates"), ("vllm", "transformers_utils/chat_templates")):
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"{package} is a test dependency"
        assert spec.origin is not None
        for file in sorted((Path(spec.origin).parent / folder).glob("*.jinja")):
            found[f"{package}/{file.stem}"] = file.read_text(encoding="utf-8")
    spec = importlib.util.find_spec("transformers")
    assert spec is not None, "transformers is a dependency"
    assert spec.origin is not None
    for file in sorted((Path(spec.origin).parent / "models").glob("*/processing_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_template(node.value):
                found.setdefault(f"transformers/{file.stem}", node.value)
    return found


def is_template(text: str) -> bool:
    """Whether a text of a program is a whole chat template, and no documentation of one."""
    return all(part in text for part in ("{%", "messages", "{{", "endfor"))


def chat_tokenizer(
    template: str | dict[str, str] | None,
    special: Iterable[str] = (),
    *,
    plain: Iterable[str] = (),
    eos: str = "<eos>",
    bos: str | None = None,
) -> PreTrainedTokenizerFast:
    """Bytes as tokens. `special` and `plain` are added tokens, the latter without `special: true`; no list of the
    tokenizer's config repeats them."""
    text = template if isinstance(template, str) else ""
    marks = dict.fromkeys(["<pad>", eos, *filter(None, [bos]), *special, *sorted(set(MARKS.findall(text)))])
    specials = [mark for mark in marks if mark not in set(plain)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *plain, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<pad>", bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, **generation: object) -> str:
    """The tokenizer's files in a folder, with a generation_config.json of the given keys."""
    tokenizer.save_pretrained(folder)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)
