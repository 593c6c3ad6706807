"""Random Llamas of a few ten thousand parameters with a character tokenizer, written to disk in seconds.

Heads have 32 dimensions, which vLLM's CPU attention needs. Vocabulary: 0 <pad>, 1 <s>, 2 </s>, 3 <unk>, then
newline and the printable ASCII characters; ids above those are never produced by the tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
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

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "qwen3": {},
        "qwen3_moe": EXPERTS,
        "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "olmoe": EXPERTS,
        "deepseek_v3": {
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1},
            **{"topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32},
            **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 2},
            "head_dim": 16,
        },
        "gemma4_text": {
            **{"global_head_dim": 32, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
            **{"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16},
        },
    }
)
"""Settings of tiny models of other families, beside those that `tiny_config` has as well."""


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


def make_family(folder: Path, model_type: str, *, seed: int = 0, **settings: object) -> Path:
    """Write a random causal language model of one of `FAMILIES` with its tokenizer to `folder`. Buffers that a
    checkpoint stores get other values than those that they start with."""
    shared = tiny_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    ends = ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    common = {name: shared[name] for name in (*names, *ends, "initializer_range")}
    config = CONFIG_MAPPING[model_type](**{**common, **FAMILIES[model_type], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        stored = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer.uniform_(1.0, 1.5)
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _write(
    folder: Path, kind: type[PreTrainedModel], config: LlamaConfig, seed: int, chat_template: str | None
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder
