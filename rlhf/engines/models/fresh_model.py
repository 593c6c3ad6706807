"""A small random Llama and its tokenizer, for the quickstart, benchmarks and tests. Needs no hub."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf.engines.process.library_output import silence_libraries

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL_TOKENS = (PAD, BOS, EOS)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE of at most `vocab_size` tokens on `texts` and save it in `folder`."""
    silence_libraries()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_llama(
    folder: Path,
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    head_dim: int = 32,
    context: int = 512,
    tie_embeddings: bool = True,
    seed: int = 0,
) -> int:
    """Save a randomly initialized Llama in `folder`, and return its number of parameters.

    `head_dim` must be at least 32, because vLLM's CPU attention needs that. The special tokens are those of
    `train_tokenizer`.
    """
    silence_libraries()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // head_dim),
        num_key_value_heads=max(1, hidden_size // head_dim),
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=tie_embeddings,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, safe_serialization=True)
    return sum(parameter.numel() for parameter in model.parameters())
