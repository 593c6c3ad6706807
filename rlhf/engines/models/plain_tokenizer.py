"""Tokenizers whose files mean what they say: transformers would take tokenizer.json as it is. Reading them takes the
`tokenizers` library alone, a fiftieth of the time that transformers takes to import.

What only transformers knows (classes that build a tokenizer of their own, older files with tokens to add) is left to
it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tokenizers import AddedToken, Tokenizer

from rlhf.config.json_file import read_json
from rlhf.engines.models import qwen_tokenizer
from rlhf.engines.models.chat_template import Templates
from rlhf.engines.models.known_models import known_config
from rlhf.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FastTokenizer: TypeAlias = "PreTrainedTokenizerFast | PlainTokenizer"
GENERIC = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Classes that take tokenizer.json as it is."""
CLASSES = {"llama": GENERIC, "qwen2": qwen_tokenizer.CLASSES, "qwen3": GENERIC | qwen_tokenizer.CLASSES}
"""The classes that transformers uses for each model type where tokenizer_config.json names them."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
WITHOUT_EFFECT = frozenset({
    "tokenizer_class", "model_max_length", "clean_up_tokenization_spaces", "backend", "is_local", "local_files_only",
    "padding_side", "truncation_side", "model_input_names", "add_bos_token", "add_eos_token", "add_prefix_space",
    "legacy", "errors", "processor_class",
})  # fmt: skip
"""Settings that change nothing of how a text of any length becomes tokens, where there is a tokenizer.json."""
OTHER_FILES = frozenset({"added_tokens.json", "chat_template.json", "additional_chat_templates"})
TOKEN_FIELDS = {"content", "lstrip", "normalized", "rstrip", "single_word", "special"}
MAX_VOCABULARY = 100_000
"""Above it, transformers looks for a mistake of one family's files."""
VERSION = re.compile(r"\d+\.\d+(\.\w+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTokenizer:
    """What this package uses of a fast tokenizer of transformers, under the same names."""

    backend_tokenizer: Tokenizer
    named: Mapping[str, str]
    """bos_token and the like."""
    extra: Sequence[str] = ()
    chat_template: Templates = None
    all_special_tokens: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "all_special_tokens", list(dict.fromkeys([*self.named.values(), *self.extra])))

    @property
    def all_special_ids(self) -> list[int]:
        ids = [self.backend_tokenizer.token_to_id(token) for token in self.all_special_tokens]
        return [token for token in ids if token is not None]

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Json]],
        *,
        chat_template: str | None,
        tools: Sequence[Json] | None,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        """The text of a conversation. Raises what the template raises, and ValueError where there is nothing to do."""
        assert not tokenize, "tokens are made by the backend"
        if not all(isinstance(tool, dict) for tool in tools or ()):
            raise ValueError("Tools should be JSON schemas.")
        from rlhf.engines.models.template_rendering import rendered  # noqa: PLC0415  slow to import

        return rendered(
            self._template(chat_template, has_tools=tools is not None),
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.named,
        )

    def _template(self, asked: str | None, *, has_tools: bool) -> str:
        own = self.chat_template
        if asked is None and isinstance(own, dict):
            return own["tool_use"] if has_tools and "tool_use" in own else own["default"]
        template = asked if asked is not None else own
        assert isinstance(template, str), "the caller asked whether there is a template"
        return template

    def _id_of(self, name: str) -> int | None:
        return self.backend_tokenizer.token_to_id(self.named[name]) if name in self.named else None


class NotPlainError(ValueError):
    """Only transformers knows what a tokenizer's files mean."""


def read_plain_tokenizer(folder: Path) -> PlainTokenizer | None:
    """The tokenizer in a model's folder; None if only transformers knows what its files mean, or what is wrong with
    them."""
    try:
        return _read(folder)
    except Exception:  # the files may be anything, and so may what their readers raise
        return None


def _read(folder: Path) -> PlainTokenizer:
    config = known_config(folder)
    if config is None or OTHER_FILES & {path.name for path in folder.iterdir()}:
        raise NotPlainError("other files, or another model")
    settings, content = read_json(folder / "tokenizer_config.json"), read_json(folder / "tokenizer.json")
    kind = settings.get("tokenizer_class")
    if kind not in CLASSES.get(config.model_type, ()):
        raise NotPlainError("the class")
    if kind in qwen_tokenizer.CLASSES:
        if not qwen_tokenizer.is_built_alike(content, settings):
            raise NotPlainError("what the class builds")
        settings = {**qwen_tokenizer.DEFAULTS, **settings}
    named = {name: settings[name] for name in NAMED if settings.get(name) is not None}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not _is_plain(folder, settings, named, extra) or content.get("truncation") or content.get("padding"):
        raise NotPlainError("the settings")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = {name: _text(token) for name, token in named.items()}
    extra_texts = tuple(map(str, extra)) if isinstance(extra, list) else ()
    if not _adds_nothing(backend, settings, [*texts.values(), *extra_texts]):
        raise NotPlainError("tokens that are added")
    if backend.get_vocab_size() > MAX_VOCABULARY and not VERSION.fullmatch(config.transformers_version or ""):
        raise NotPlainError("the family")
    templates = _templates(folder, settings)
    return PlainTokenizer(backend_tokenizer=backend, named=texts, extra=extra_texts, chat_template=templates)


def _is_plain(folder: Path, settings: Mapping[str, object], named: Mapping[str, object], extra: object) -> bool:
    """Whether every setting is known, and none of them changes a token."""
    known = {*NAMED, *WITHOUT_EFFECT, "added_tokens_decoder", "chat_template"}
    both = ("extra_special_tokens", "additional_special_tokens")
    return (
        settings.keys() <= {*known, *both, "split_special_tokens"}
        and settings.get("split_special_tokens") in (None, False)
        and not settings.get("add_prefix_space")
        and not (settings.get(both[0]) and settings.get(both[1]))
        and all(isinstance(token, str) or _is_added(token) for token in named.values())
        and isinstance(extra, list)
        and all(isinstance(token, str) for token in extra)
        and ("added_tokens_decoder" in settings or not (folder / "special_tokens_map.json").exists())
    )


def _is_added(token: object) -> bool:
    return isinstance(token, dict) and token.keys() == {"__type", *TOKEN_FIELDS} and token["__type"] == "AddedToken"


def _text(token: object) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _adds_nothing(backend: Tokenizer, settings: Mapping[str, object], special: Sequence[str]) -> bool:
    """Whether all tokens that the settings name are in tokenizer.json, with the same properties."""
    own = list(backend.get_added_tokens_decoder().values())
    listed = settings.get("added_tokens_decoder", {})
    if not isinstance(listed, dict) or not all(
        isinstance(token, dict) and token.keys() == TOKEN_FIELDS for token in listed.values()
    ):
        return False
    described = {repr(token) for token in own}
    return {token.content for token in own} >= set(special) and all(
        repr(AddedToken(**token)) in described for token in listed.values()
    )


def _templates(folder: Path, settings: Mapping[str, object]) -> Templates:
    """The chat template of its own file, else that of the settings, which may be several by name. Raises KeyError or
    TypeError where it is neither."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    own = settings.get("chat_template")
    if isinstance(own, list):
        return {str(one["name"]): str(one["template"]) for one in own}
    if own is not None and not isinstance(own, str):
        raise TypeError("a template is text")
    return own
