"""What both sides are given: a fresh model whose answers are as long as a case says, prompts, and given answers.

Lengths are the model's own doing. One channel of the residual stream is the same for every token and written by no
layer, so that a token's embedding in that channel is its bias in the logits (embeddings are tied). The bias of EOS
decides how answers end:

- uniform: EOS is never sampled, and every answer has the most tokens allowed;
- long: EOS has the same probability, 1 / mean, at every token. Lengths are geometric with a mean of half the uniform
  length, cut at four times the uniform length: the longest of 32 answers is about four times their mean.

Given answers (SFT, reward model, DPO, KTO) have the same lengths by construction: words drawn by chance, where chosen
answers favor even words and rejected ones odd words.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.engines.models.fresh_model import BOS, EOS, PAD, make_llama

Lengths = Literal["uniform", "long"]
Method = Literal["sft", "rm", "dpo", "kto", "grpo", "online-dpo"]
METHODS: tuple[Method, ...] = ("sft", "rm", "dpo", "kto", "grpo", "online-dpo")
ONLINE = ("grpo", "online-dpo")
PROMPT_TOKENS = 16
UNKNOWN = "<unk>"
EOS_ID, FIRST_WORD = 2, 4
NEVER = -30.0
"""Bias of a token that is not sampled."""
CONSTANT = 1.0
"""What every token's embedding holds in the constant channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model, and the batch that goes with it."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_answers: int
    """Answers (for preference pairs and demonstrations: rows) in a step."""
    num_tokens: int
    """Length of every answer, where lengths are uniform."""


SIZES = {
    "tiny": Size(vocab_size=512, hidden_size=64, num_layers=5, num_answers=64, num_tokens=64),
    "25m": Size(vocab_size=8192, hidden_size=384, num_layers=12, num_answers=32, num_tokens=128),
}
NUM_SAMPLES = {"grpo": 8, "online-dpo": 2}
"""Answers to each prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the table."""

    method: Method
    size: str
    lengths: Lengths
    num_steps: int
    seed: int = 0

    @property
    def lr(self) -> float:
        """Sampled lengths are the untrained model's: a few steps of learning would change how answers end."""
        return 1e-8 if self.method in ONLINE and self.lengths == "long" else 1e-4

    @property
    def shape(self) -> Size:
        return SIZES[self.size]

    @property
    def mean_tokens(self) -> int:
        return self.shape.num_tokens if self.lengths == "uniform" else self.shape.num_tokens // 2

    @property
    def max_tokens(self) -> int:
        return self.shape.num_tokens if self.lengths == "uniform" else self.shape.num_tokens * 4

    @property
    def group_size(self) -> int:
        return NUM_SAMPLES.get(self.method, 1)

    @property
    def num_rows_a_step(self) -> int:
        """Prompts, demonstrations, pairs or labeled answers."""
        return self.shape.num_answers // self.group_size

    @property
    def title(self) -> str:
        return f"{self.method} {self.size} {self.lengths}"


def write_case(case: Case, folder: Path) -> None:
    """Write `model/`, `rows.jsonl` (ours) and `case.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(case, folder / "model")
    rows = make_rows(case)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "case.json").write_text(json.dumps(asdict(case)))


def read_case(folder: Path) -> Case:
    return Case(**json.loads((folder / "case.json").read_text()))


def make_model(case: Case, folder: Path) -> None:
    """A fresh Llama with a tokenizer of one token a word, biased as the case's lengths ask."""
    shape = case.shape
    words = [f"w{i}" for i in range(FIRST_WORD, shape.vocab_size)]
    vocabulary = {word: i for i, word in enumerate((PAD, BOS, EOS, UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN
    ).save_pretrained(folder)
    make_llama(
        folder,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        context=1024,
        seed=case.seed,
    )
    model = LlamaForCausalLM.from_pretrained(folder)
    bias_endings(model, None if case.lengths == "uniform" else 1 / case.mean_tokens)
    model.save_pretrained(folder)


@torch.no_grad()
def bias_endings(model: LlamaForCausalLM, probability: float | None) -> None:
    """Let EOS have `probability` after any words, or none at all; padding, BOS and unknown words have none."""
    embeddings = model.model.embed_tokens.weight
    embeddings[:, 0] = CONSTANT
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    torch.manual_seed(0)
    text = torch.randint(FIRST_WORD, model.config.vocab_size, (8, 64))
    hidden = model.model(text).last_hidden_state
    logits = model.lm_head(hidden)
    unit = hidden[..., 0].mean()
    """Logits that one unit in the constant channel of an embedding is worth."""
    wanted = NEVER
    if probability is not None:
        others = logits[..., FIRST_WORD:].logsumexp(-1).mean() - logits[..., EOS_ID].mean()
        wanted = float(others + np.log(probability / (1 - probability)))
    embeddings[EOS_ID, 0] += wanted / unit
    for token in range(FIRST_WORD):
        if token != EOS_ID:
            embeddings[token, 0] += NEVER / unit


def make_rows(case: Case) -> list[dict[str, object]]:
    """Rows as published data sets have them; prompts for all, and what the method learns from."""
    rng = np.random.default_rng(case.seed)
    rows: list[dict[str, object]] = []
    for number in range(case.num_rows_a_step * case.num_steps):
        prompt: dict[str, object] = {"prompt": _words(rng, case, PROMPT_TOKENS, parity=None)}
        good, bad = (" " + _words(rng, case, _length(rng, case) - 1, parity=parity) for parity in (0, 1))
        if case.method == "sft":
            rows.append(prompt | {"completion": good})
        elif case.method in ("rm", "dpo"):
            rows.append(prompt | {"chosen": good, "rejected": bad})
        elif case.method == "kto":
            rows.append(prompt | {"completion": bad if number % 2 else good, "label": number % 2 == 0})
        else:
            rows.append(prompt)
    return rows


def _length(rng: np.random.Generator, case: Case) -> int:
    """Tokens of an answer, its EOS among them."""
    if case.lengths == "uniform":
        return case.max_tokens
    return int(np.clip(rng.geometric(1 / case.mean_tokens), 2, case.max_tokens))


def _words(rng: np.random.Generator, case: Case, number: int, *, parity: int | None) -> str:
    """Words by chance; three in four are even (parity 0) or odd (1)."""
    ids = rng.integers(FIRST_WORD, case.shape.vocab_size - 1, number)
    if parity is not None:
        ids = np.where(rng.random(number) < 0.75, ids // 2 * 2 + parity, ids)
    return " ".join(f"w{i}" for i in ids)


def even_share(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward of both sides: the share of an answer's words that are even. Others are no numbers."""
    answers = [[int(word[1:]) for word in response.split() if word[1:].isdigit()] for response in responses]
    return [sum(number % 2 == 0 for number in words) / max(1, len(words)) for words in answers]
