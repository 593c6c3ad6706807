"""What is trained on is what was served, token by token, for the templates of many families: random episodes with
tools, thoughts, any script and odd spaces. `RLHF_TEST_EPISODES` is their number for each family."""

import os
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from rlhf.engines.models.tokenizer import HfTokenizer
from rlhf.environments.calls import Call
from rlhf.environments.conversation import Conversation
from rlhf.environments.formats.known import find_format
from rlhf.environments.scripted import SAID, ScriptedPolicy, script_for
from rlhf.environments.spec import EpisodeWorld
from rlhf.episode import Ending
from tests.unit.environments.family_templates import TEMPLATES, WITHOUT_TOOLS, family_tokenizer
from tests.unit.environments.random_episodes import TOOLS, Played, play
from tests.unit.environments.support import make_prompt, make_request

NUMBER = int(os.environ.get("RLHF_TEST_EPISODES", "50"))
ONE_CALL = {"Llama 3", "gpt-oss"}
"""Families whose turns have one call."""
REWRITING = {"Qwen 3", "DeepSeek R1"}
"""Families whose templates do not keep turns that they wrote themselves: thoughts that are empty, or any at all."""

tokenizer_of = cache(family_tokenizer)


def require_served(played: Played) -> None:
    """Each turn stands in a segment after exactly what the engine read, and nothing else is learned from."""
    rollout = played.rollout
    ids = np.concatenate([played.prompt_ids, rollout.token_ids])
    mask = np.ones(len(rollout.token_ids), dtype=bool) if rollout.loss_mask is None else rollout.loss_mask
    own = np.concatenate([np.zeros(len(played.prompt_ids), dtype=bool), mask])
    starts = [0, *(len(played.prompt_ids) + start for start in rollout.segment_starts), len(ids)]
    segments = [(ids[start:end], own[start:end]) for start, end in pairwise(starts)]
    assert len(segments) == rollout.episode.num_segments, "each seal is counted"
    learned = [np.zeros(len(segment), dtype=bool) for segment, _ in segments]
    for read, wrote in played.served:
        whole = np.concatenate([read, wrote])
        # A segment's prompt may repeat turns that an earlier segment learns from.
        places = [
            n
            for n, (segment, is_own) in enumerate(segments)
            if np.array_equal(segment[: len(whole)], whole) and is_own[len(read) : len(whole)].all()
        ]
        assert len(places) == 1, "the engine read and wrote what one segment has"
        learned[places[0]][len(read) : len(whole)] = True
    for (_, is_own), expected in zip(segments, learned, strict=True):
        assert np.array_equal(is_own, expected)


def require_rendered(tokenizer: HfTokenizer, talk: Conversation, *, is_split: bool, tools: object) -> None:
    """What stands before a segment's last turn is what the template writes for the turns so far, and encodes to the
    same tokens."""
    if not talk.turns:
        return
    ids = talk.request_ids[: len(talk.prompt_ids) + talk.turns[-1].start].tolist()
    last = max(n for n, message in enumerate(talk.messages) if message.role == "assistant")
    text = tokenizer.render(talk.messages[:last], add_generation_prompt=True, tools=tools)  # type: ignore[arg-type]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    begins = [tokenizer.decode(turn.rollout.token_ids.tolist())[:1] for turn in talk.turns]
    if not is_split and not any(first.isspace() for first in begins):
        # A space at the beginning of a turn could be one token with the end of the prompt, where it was sampled alone.
        assert tokenizer.encode(text) == ids


PLAYED = [(family, False) for family in TEMPLATES] + [
    (family, True) for family in TEMPLATES if family not in WITHOUT_TOOLS
]
"""Families, and whether they call tools: all play games, and those whose templates write calls call tools too."""


@pytest.mark.parametrize(("family", "with_tools"), PLAYED)
def test_what_is_trained_on_is_what_was_served(family: str, with_tools: bool) -> None:
    tokenizer, tools = tokenizer_of(family), TOOLS if with_tools else ()
    seen: Counter[str] = Counter()
    for index in range(NUMBER):
        is_odd = index % 2 == 0
        played = play(tokenizer, f"{family}/{index}", tools=tools, odd=is_odd, one_call=family in ONE_CALL)
        require_served(played)
        for talk in played.transcript.segments:
            require_rendered(tokenizer, talk, is_split=played.is_split, tools=tools)
        episode = played.rollout.episode
        if with_tools and not is_odd and family not in REWRITING:
            assert (episode.num_segments, episode.ending == Ending.SEALED) == (1, False), "the template keeps its turns"
        seen += Counter(turns=episode.num_turns, seals=episode.num_segments - 1, calls=episode.num_calls)
        seen[episode.ending] += 1
    print(family, dict(seen))  # noqa: T201  the figures of a long run
    assert seen["turns"] > NUMBER // 2


@pytest.mark.parametrize("family", [family for family in TEMPLATES if family not in WITHOUT_TOOLS])
def test_a_dry_run_calls_a_tool_in_each_form(family: str) -> None:
    tokenizer, world = tokenizer_of(family), EpisodeWorld(tools=TOOLS)
    policy = ScriptedPolicy(tokenizer, script_for(world), world)
    texts = []
    for _ in range(2):
        (future,) = policy.submit([make_request(make_prompt(tokenizer))])
        ids = future.result().token_ids
        assert ids[-1] in tokenizer.stop_token_ids
        texts.append(tokenizer.decode(ids[:-1], skip_special_tokens=False))
    form = find_format(tokenizer, TOOLS)
    calls, answer = (form.read(text, TOOLS) for text in texts)
    assert calls.calls == (Call(name="lookup", arguments={"text": "text"}),)
    assert (answer.calls, answer.text.strip()) == ((), SAID)
