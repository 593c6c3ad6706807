"""Calls the user's reward functions on a few real rows before anything starts. Imports no torch and no ray."""

import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial

import numpy as np

from rlhf.config.reward import FunctionSource, RewardSection
from rlhf.conversations.messages import as_json
from rlhf.engines.rewards import PROBE_RESPONSES, FunctionReward, build_source, check_function, made_up_rollout
from rlhf.launch.findings import Findings
from rlhf.orchestrator.data.records import Record, as_chat, as_plain
from rlhf.types import Json, Prompt, Reward, Rollout

NUM_ROWS = 2
MAX_SHOWN = 60


def try_functions(section: RewardSection, prompts: Sequence[Prompt]) -> list[str]:
    """Score made-up responses to the first prompts by every reward function, in its child process. Returns a line for
    each that shows one row with its scores. Without prompts, the functions are only imported.

    Raises:
        ConfigError: a function cannot be used, or it is not clear what its parameters should get; or several fail.
        RewardError: a function fails.
    """
    found = Findings()
    sources = [source for source in section.all_sources if isinstance(source, FunctionSource)]
    lines = [found.attempt(partial(_try, source, prompts[:NUM_ROWS])) for source in sources]
    found.settle()
    return [line for line in lines if line is not None]


def prompts_of(records: Sequence[Record], num_rows: int = NUM_ROWS) -> list[Prompt]:
    """The first rows as prompts that no tokenizer has seen: text is not rendered, and there are no tokens."""
    return [
        Prompt(
            id=record.id,
            token_ids=np.zeros(0, dtype=np.int64),
            text=str(as_plain(record).prompt),
            label=record.label,
            metadata={**record.metadata, "messages": _messages(record)},
        )
        for record in records[:num_rows]
    ]


def _try(source: FunctionSource, prompts: Sequence[Prompt]) -> str:
    if not prompts:
        check_function(source.function, network=source.network)
        return f"reward {source.label}: {source.function} can be imported; the rows were not read."
    tried = [(prompt, text) for prompt in prompts for text in default_responses(prompt)]
    of_each, texts = [prompt for prompt, _ in tried], [text for _, text in tried]
    opened = build_source(source)
    assert isinstance(opened, FunctionReward), "that is what it builds for a function"
    with closing(opened) as reward:
        start = time.monotonic()
        scores = reward.score(of_each, texts, [response_of(prompt, text) for prompt, text in tried])
        seconds = time.monotonic() - start
        got = reward.binding_for(prompts).described
    first, others = (_scored(text, score) for text, score in list(zip(texts, scores, strict=True))[:2])
    which = "its label " if prompts[0].label is not None else ""
    return (
        f"reward {source.label}: {source.function} gets {got}. Row {prompts[0].id}: {which}{first}, {others} "
        f"({seconds:.2f} s)."
    )


def default_responses(prompt: Prompt) -> tuple[str, str]:
    """The row's label, which a right response is or contains, and a made-up response."""
    return (PROBE_RESPONSES[0] if prompt.label is None else prompt.label, PROBE_RESPONSES[1])


def response_of(prompt: Prompt, text: str) -> Rollout:
    """A response with this text. There may be no tokenizer: one token a byte."""
    return made_up_rollout(prompt, text, list(text.encode(errors="replace") or b" "))


def _scored(text: str, reward: Reward) -> str:
    return f"{shown_text(text)} scores {shown_score(reward)}"


def shown_text(text: str) -> str:
    """The beginning of a text, in quotes and on one line."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:MAX_SHOWN])
    return f'"{shown}{"..." if len(text) > MAX_SHOWN else ""}"'


def shown_score(reward: Reward) -> str:
    """A score with its parts."""
    parts = "".join(f", {name} {value:g}" for name, value in reward.parts.items())
    return f"{f'{reward.total:g}' if reward.is_scored else 'None'}{f' ({parts[2:]})' if parts else ''}"


def _messages(record: Record) -> list[Json]:
    prompt = as_chat(record).prompt
    assert not isinstance(prompt, str), "as_chat makes messages"
    return [as_json(turn) for turn in prompt]
