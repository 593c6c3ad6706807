"""Random Llamas of a few ten thousand parameters with a character tokenizer, written to disk in seconds.

Heads have 32 dimensions, which vLLM's CPU attention needs. Vocabulary: 0 <pad>, 1 <s>, 2 </s>, 3 <unk>, then
newline and the printable ASCII characters; ids above those are never produced by the tokenizer.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def tiny_config(*, tied: bool = False, vocab_size: int = 128, num_labels: int = 1) -> LlamaConfig:
    """Two layers, hidden size 64, two heads of 32 dimensions."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        num_labels=num_labels,  # type: ignore[call-arg]
        initializer_range=0.1,
    )


def tiny_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a character; decoding gives the text back exactly."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "\n", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def make_policy(
    folder: Path, *, tied: bool = False, vocab_size: int = 128, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Write a random causal language model with its tokenizer to `folder`."""
    return _write(folder, LlamaForCausalLM, tiny_config(tied=tied, vocab_size=vocab_size), seed, chat_template)


def make_reward_model(folder: Path, *, num_labels: int = 1, vocab_size: int = 128, seed: int = 1) -> Path:
    """Write a random scorer (a `score` head on the same backbone) with its tokenizer to `folder`."""
    config = tiny_config(vocab_size=vocab_size, num_labels=num_labels)
    return _write(folder, LlamaForSequenceClassification, config, seed, CHAT_TEMPLATE)


def _write(
    folder: Path, kind: type[PreTrainedModel], config: LlamaConfig, seed: int, chat_template: str | None
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder
