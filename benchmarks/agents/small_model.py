"""A small chat model, made within a minute: a tokenizer of words and characters, and supervised learning."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf.engines.models.fresh_model import BOS, EOS, PAD, SPECIAL_TOKENS, make_llama
from rlhf.engines.models.tokenizer import HfTokenizer, load_tokenizer
from rlhf.types import Json, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a model reads conversations."""

    template: str
    opening: str
    """What begins its own turns, and nothing else."""


CALLS = Form(
    template="""
{%- if tools %}{{- '<s>tools' }}{% for tool in tools %}{{- ' ' + tool.function.name }}{% endfor %}{{- '</s>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<s>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson + '}</tool_call>' }}
    {%- endfor %}
    {{- '</s>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}{%- endif %}
""",
    opening="<s>assistant\n",
)
"""That of Hermes and Qwen, and short: of tools it shows the names alone."""
TALK = Form(
    template="""
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{{- '<s>' + message.content + '</s>' }}
    {%- else %}{{- message.content + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>' }}{%- endif %}
""",
    opening="<s>",
)
"""Without tools, in few tokens."""
CONTEXT = 256
BATCH_SIZE, WARMUP_STEPS = 32, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """Supervised learning on conversations."""

    name: str
    conversations: Sequence[Sequence[Message]]
    steps: int
    lr: float
    tools: Sequence[Json] = ()


def make_tokenizer(folder: Path, template: str, pieces: str, words: Sequence[str]) -> tuple[HfTokenizer, int]:
    """Save a tokenizer with a chat template whose tokens are what the regular expression `pieces` matches: single
    characters and `words`. Returns it, and how many tokens it has."""
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, "<unk>", "\n", *map(chr, range(32, 127)), *words])
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token="<unk>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return load_tokenizer(str(folder)), len(vocabulary)


def make_model(
    folder: Path,
    *,
    form: Form,
    pieces: str,
    words: Sequence[str],
    lessons: Sequence[Lesson],
    emphasized: Sequence[str],
    seed: int,
) -> None:
    """Write a model of two layers, with a tokenizer of `make_tokenizer`, that has had all lessons. The tokens
    `emphasized` count as much in the loss as all others together, which repeat what every conversation has."""
    torch.set_num_threads(1)  # matrices are so small that more threads wait for each other
    start = time.monotonic()
    tokenizer, size = make_tokenizer(folder, form.template, pieces, words)
    num = make_llama(folder, vocab_size=size, hidden_size=128, num_layers=2, context=CONTEXT, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    weighty = torch.tensor([token for text in emphasized for token in tokenizer.encode(text)])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for lesson in lessons:
        ids, labels = encoded(tokenizer, form, lesson)
        for step in range(lesson.steps):
            optimizer.param_groups[0]["lr"] = lesson.lr * min(1.0, (step + 1) / WARMUP_STEPS)
            chosen = torch.randint(len(ids), (BATCH_SIZE,))
            logits = model(input_ids=ids[chosen], attention_mask=ids[chosen] != 0).logits[:, :-1]
            loss = loss_of(logits, labels[chosen, 1:], weighty)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(f"{lesson.name}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)
    model.save_pretrained(folder)
    print(f"{num:,} parameters, made in {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def encoded(tokenizer: HfTokenizer, form: Form, lesson: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [conversations, tokens]; labels are -100 outside the assistant's turns."""
    begin = tokenizer.encode(form.opening)
    (end,) = tokenizer.encode(EOS)
    rows, labels = [], []
    for conversation in lesson.conversations:
        ids = tokenizer.encode(tokenizer.render(conversation, add_generation_prompt=False, tools=lesson.tools))
        is_own, own = False, []
        for i, token in enumerate(ids):
            is_own = is_own or ids[max(0, i - len(begin)) : i] == begin
            own.append(token if is_own else -100)
            is_own = is_own and token != end
        rows.append(torch.tensor(ids))
        labels.append(torch.tensor(own))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=-100)


def loss_of(logits: torch.Tensor, labels: torch.Tensor, emphasized: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, where emphasized tokens count as much as all others together."""
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    is_emphasized = torch.isin(labels.flatten(), emphasized)
    is_other = (labels.flatten() >= 0) & ~is_emphasized
    return losses[is_emphasized].mean() + losses[is_other].mean()
