"""One row of a data set as a model gets it: its tokens as text, those that are trained on marked."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from rich.text import Text

from rlhf.engines.base import Tokenizer
from rlhf.launch.episode_trial import EpisodeTrial
from rlhf.orchestrator.data.encoding import EncodedResponse
from rlhf.terminal import counted, rich_console
from rlhf.types import Prompt

MAX_TOKENS = 400
"""Tokens that are shown of a prompt or a response: half of them from its beginning, half from its end."""
TRAINED, SPECIAL = "bold green", "reverse"
OPEN, CLOSE = "«", "»"
NAMES = {1: ("response",), 2: ("chosen", "rejected")}


def shown_row(
    prompt: Prompt, responses: Sequence[EncodedResponse], tokenizer: Tokenizer, *, in_color: bool
) -> Iterator[Text]:
    """Lines about a row. Special tokens are shown as they are called. Tokens that are trained on are in color, or
    between « and » where there is none."""
    marks = "in color" if in_color else f"between {OPEN} and {CLOSE}"
    what = f"trained tokens are {marks}" if responses else "the policy continues it"
    yield Text(f"row {prompt.id} as the model gets it ({what}):", style="bold")
    prompt_ids = [int(token) for token in prompt.token_ids]
    yield Text(f"prompt, {counted(len(prompt_ids), 'token')}:")
    yield _tokens(prompt_ids, [False] * len(prompt_ids), tokenizer, in_color=in_color)
    names = NAMES.get(len(responses)) or tuple(f"response {n}" for n in range(1, len(responses) + 1))
    for name, response in zip(names, responses, strict=True):
        written = [bool(one) for one in response.written]
        yield Text(f"{name}, {counted(len(written), 'token')}, {sum(written)} of them trained on:")
        yield _tokens([int(token) for token in response.token_ids], written, tokenizer, in_color=in_color)
    if prompt.label is not None:
        yield Text(f"label: {prompt.label}")


def show_episode(trial: EpisodeTrial) -> None:
    """Print an episode as the model gets it, after a line about what happened."""
    console = rich_console(soft_wrap=True)
    rollout = trial.rollout
    written = np.ones(len(rollout.token_ids), dtype=np.bool_) if rollout.loss_mask is None else rollout.loss_mask
    response = EncodedResponse(text="", token_ids=rollout.token_ids, written=written)
    in_color = console.color_system is not None
    for line in (Text(trial.line), *shown_row(trial.prompt, [response], trial.tokenizer, in_color=in_color)):
        console.print(line)


def _tokens(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer, *, in_color: bool) -> Text:
    """Tokens as text, with a line about those in the middle of a long one that are left out."""
    if len(ids) > MAX_TOKENS:
        half = MAX_TOKENS // 2
        before = _tokens(ids[:half], trained[:half], tokenizer, in_color=in_color)
        after = _tokens(ids[-half:], trained[-half:], tokenizer, in_color=in_color)
        return Text.assemble(before, f"\n... {len(ids) - MAX_TOKENS} tokens ...\n", after)
    text = Text()
    special = set(tokenizer.control_tokens)
    for is_trained, group in groupby(zip(ids, trained, strict=True), key=lambda one: one[1]):
        style = TRAINED if is_trained else ""
        text.append(OPEN if is_trained and not in_color else "")
        for piece in _pieces([token for token, _ in group], tokenizer):
            text.append(piece, f"{style} {SPECIAL}".strip() if piece in special else style)
        text.append(CLOSE if is_trained and not in_color else "")
    return text


def _pieces(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Special tokens one by one, and the text of those between them."""
    special = set(tokenizer.control_tokens)

    def name_of(token: int) -> str:
        name = tokenizer.decode([token], skip_special_tokens=False)
        return name if name in special else ""

    for is_special, group in groupby(ids, key=lambda token: name_of(token) != ""):
        tokens = list(group)
        if is_special:
            yield from map(name_of, tokens)
        else:
            yield tokenizer.decode(tokens, skip_special_tokens=False)
