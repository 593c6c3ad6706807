"""The tokenizer of a reward model that reads both ways: a prompt and a response as its tokenizer joins two texts."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from rlhf.config.model_files import describe_model
from rlhf.config.reward import PrmSource, StartedSource
from rlhf.engines.models.chat_template import cause_of
from rlhf.engines.models.loading import require_supported_model
from rlhf.engines.models.pooled import texts_of
from rlhf.engines.models.tokenizer import HfTokenizer, load_tokenizer
from rlhf.errors import ModelError
from rlhf.types import Message


class HfPairTokenizer:
    """A fast tokenizer of transformers behind the PairTokenizer protocol."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int | None, where: str) -> None:
        """Raises ModelError where the tokenizer numbers its two texts in a way of its own."""
        self.max_tokens = max_tokens
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._like_policy = HfTokenizer(tokenizer) if isinstance(tokenizer.eos_token_id, int) else None
        pair = self._backend.encode("a b", "c", add_special_tokens=True)
        separator = tokenizer.sep_token_id
        ours = texts_of(torch.tensor([pair.ids]), separator)[0].tolist() if isinstance(separator, int) else []
        if "token_type_ids" in tokenizer.model_input_names and separator is not None and ours != list(pair.type_ids):
            raise ModelError(
                f"{where}: its tokenizer numbers two texts as {pair.type_ids}, which is not supported; serve it over "
                "HTTP (reward.url)."
            )

    def encode_pair(self, prompt: str, response: str) -> list[int]:
        """See `PairTokenizer.encode_pair`."""
        ids: list[int] = self._backend.encode(prompt, response, add_special_tokens=True).ids
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int] | None:
        """See `PairTokenizer.encode_chat`."""
        if self._like_policy is None or not self._like_policy.has_chat_template:
            return None
        return self._like_policy.encode(self._like_policy.render(messages, add_generation_prompt=False))

    def fingerprint(self) -> str | None:
        """See `PairTokenizer.fingerprint`."""
        return None if self._like_policy is None else self._like_policy.fingerprint()


def load_reward_tokenizer(source: StartedSource, model: str, *, key: str) -> HfTokenizer | HfPairTokenizer:
    """The tokenizer of a reward model: for an encoder one that joins two texts. Raises ModelError."""
    folder = require_supported_model(source, model, where=key)
    facts = describe_model(folder)
    if isinstance(source, PrmSource) or facts.has_own_code or has_score_layer(folder):
        return load_tokenizer(model, key=key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{key}: {model} has a tokenizer that cannot be read ({cause_of(error)}).") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"{key}: {model} has no fast tokenizer (tokenizer.json).")
    return HfPairTokenizer(tokenizer, max_tokens=facts.context, where=key)


def has_score_layer(folder: Path) -> bool:
    """Whether the classifier of a model's type has a score at the last token; True for a type without classifiers,
    which is refused when the model is loaded."""
    config = AutoConfig.from_pretrained(folder)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        return True
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    return "score" in dict(model.named_children())


def separator_of(folder: Path) -> int | None:
    """The token between two texts, of a tokenizer whose model is told which text each token is in."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception:  # load_reward_tokenizer says what is wrong
        return None
    separator = tokenizer.sep_token_id if "token_type_ids" in tokenizer.model_input_names else None
    return separator if isinstance(separator, int) else None
