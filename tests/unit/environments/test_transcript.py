"""A response of several segments: what is learned from, in which context, and how old it is."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from rlhf.algorithms.sequences import one_by_one
from rlhf.environments.conversation import Conversation
from rlhf.environments.transcript import Transcript
from rlhf.types import FinishReason, Message, Prompt, Reward, Rollout, ScoredGroup
from tests.unit.environments.support import byte_tokenizer, make_prompt
from tests.unit.environments.test_conversation import sampled

TOKENIZER = byte_tokenizer()
GO_ON = Message(role="user", content="on")


def say(talk: Conversation, text: str, *, version: int = 0, older: int = 0) -> Rollout:
    turn = sampled(TOKENIZER, text, version=version)
    if older:
        turn = Rollout(
            id="r",
            prompt_id="p",
            token_ids=turn.token_ids,
            log_probs=turn.log_probs,
            finish_reason=turn.finish_reason,
            weight_version=version,
            num_older_tokens=older,
            newest_version=version + 1,
        )
    talk.add_turn(turn)
    return turn


def hear(talk: Conversation) -> None:
    talk.add_world([GO_ON], *talk.world_tokens([GO_ON]))


def begin(transcript: Transcript, *texts: str) -> Conversation:
    messages = [Message(role="user", content=text) for text in texts]
    transcript.segments.append(Conversation.rendered(TOKENIZER, messages, ()))
    return transcript.current


def contexts(transcript: Transcript) -> list[str]:
    return contexts_of(transcript.rollout("r", "p", FinishReason.STOP), make_prompt(TOKENIZER))


def contexts_of(rollout: Rollout, prompt: Prompt) -> list[str]:
    """What the model reads one by one, with what is learned from in brackets."""
    (example,) = one_by_one(
        [ScoredGroup(prompt=prompt, responses=(rollout,), texts=("",), rewards=(Reward(total=0.0),))]
    )
    (sequence,) = example.sequences
    shown = []
    for start, end in pairwise([0, *sequence.segment_starts, len(sequence)]):
        tokens = [TOKENIZER.decode([token], skip_special_tokens=False) for token in sequence.token_ids[start:end]]
        marked = zip(tokens, sequence.loss_mask[start:end], strict=True)
        shown.append("".join(f"[{token}]" if is_own else token for token, is_own in marked).replace("][", ""))
    return shown


def test_each_segment_begins_with_its_own_prompt() -> None:
    transcript = Transcript(TOKENIZER, make_prompt(TOKENIZER), ())
    say(transcript.current, "a")
    hear(transcript.current)
    say(transcript.current, "b")
    say(begin(transcript, "Sum up."), "c")
    before = "<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n"
    assert contexts(transcript) == [
        f"{before}<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]",
        "<|im_start|>user\nSum up.<|im_end|>\n<|im_start|>assistant\n[c<|im_end|>]",
    ]
    rollout = transcript.rollout("r", "p", FinishReason.STOP)
    assert len(rollout.token_ids) + len(transcript.segments[0].prompt_ids) == transcript.num_tokens
    assert rollout.loss_mask is not None
    assert transcript.num_world_tokens == np.count_nonzero(~rollout.loss_mask)
    ends = [TOKENIZER.decode([rollout.token_ids[end]], skip_special_tokens=False) for end in transcript.turn_ends]
    assert ends == ["<|im_end|>"] * 3
    assert transcript.turn_ends[-1] == len(rollout.token_ids) - 1
    assert np.array_equal(rollout.log_probs != 0, rollout.loss_mask)


def test_a_response_may_leave_its_prompt_at_once() -> None:
    transcript = Transcript(TOKENIZER, make_prompt(TOKENIZER), ())
    say(begin(transcript, "Other."), "c")
    assert transcript.rollout("r", "p", FinishReason.STOP).segment_starts == (0,)
    assert contexts(transcript)[0].endswith("Go.<|im_end|>\n<|im_start|>assistant\n")


def test_the_age_is_that_of_the_oldest_token() -> None:
    transcript = Transcript(TOKENIZER, make_prompt(TOKENIZER), ())
    for version in (3, 3, 4):
        say(transcript.current, "a", version=version)
        hear(transcript.current)
    rollout = transcript.rollout("r", "p", FinishReason.STOP)
    assert (rollout.weight_version, rollout.newest_version) == (3, 4)
    assert rollout.loss_mask is not None
    own = np.flatnonzero(rollout.loss_mask)
    assert rollout.num_older_tokens == own[4], "the first token of the third turn, of two tokens each"


def test_a_turn_that_saw_new_weights_is_new_from_there_on() -> None:
    transcript = Transcript(TOKENIZER, make_prompt(TOKENIZER), ())
    say(transcript.current, "a", version=3)
    hear(transcript.current)
    say(transcript.current, "bcd", version=3, older=2)
    hear(transcript.current)
    say(transcript.current, "e", version=4)
    rollout = transcript.rollout("r", "p", FinishReason.STOP)
    assert rollout.loss_mask is not None
    own = np.flatnonzero(rollout.loss_mask)
    assert (rollout.weight_version, rollout.newest_version, rollout.num_older_tokens) == (3, 4, own[4])


@pytest.mark.parametrize("versions", [(4, 3), (4, 3, 4)])
def test_what_stands_before_an_older_turn_counts_as_older(versions: tuple[int, ...]) -> None:
    """A caller may go on with an earlier conversation: turns then stand in another order than they were sampled in."""
    transcript = Transcript(TOKENIZER, make_prompt(TOKENIZER), ())
    turns = [say(begin(transcript, "x"), "a", version=version) for version in versions]
    rollout = transcript.rollout("r", "p", FinishReason.STOP)
    assert rollout.loss_mask is not None
    left = np.flatnonzero(rollout.loss_mask) >= rollout.num_older_tokens
    assert (rollout.weight_version, rollout.newest_version) == (3, 4)
    assert left.sum() == (len(turns[-1].token_ids) if versions[-1] == 4 else 0)


def test_a_conversation_of_one_version_has_no_older_tokens() -> None:
    transcript = Transcript(TOKENIZER, make_prompt(TOKENIZER, is_open=True), ())
    hear(transcript.current)
    say(transcript.current, "a", version=5)
    rollout = transcript.rollout("r", "p", FinishReason.STOP)
    assert (rollout.weight_version, rollout.newest_version, rollout.num_older_tokens) == (5, 5, 0)


def test_a_turn_that_is_only_read_is_no_part_of_the_loss() -> None:
    transcript = Transcript(TOKENIZER, make_prompt(TOKENIZER), ())
    transcript.current.add_turn(sampled(TOKENIZER, "a"), is_learned=False)
    hear(transcript.current)
    say(transcript.current, "b")
    rollout = transcript.rollout("r", "p", FinishReason.STOP)
    assert rollout.loss_mask is not None
    assert TOKENIZER.decode(rollout.token_ids[rollout.loss_mask].tolist(), skip_special_tokens=False) == "b<|im_end|>"


def routed_turn(talk: Conversation, text: str, number: int) -> None:
    """A turn of which the engine says that all tokens of its context went to expert `number`."""
    turn = sampled(TOKENIZER, text)
    experts = np.full((len(talk.request_ids) + len(turn.token_ids), 2, 1), number, dtype=np.uint8)
    experts[-1] = 255
    talk.add_turn(replace(turn, routed_experts=experts))


def test_a_token_keeps_the_experts_of_the_turn_that_first_computed_it() -> None:
    """The last token of a turn was first computed as context of the next one."""
    transcript = Transcript(TOKENIZER, make_prompt(TOKENIZER), ())
    first = transcript.current
    routed_turn(first, "a", 1)
    hear(first)
    turn_of_two = len(first.request_ids)
    routed_turn(first, "bc", 2)
    hear(first)
    end = len(first.request_ids)
    other = begin(transcript, "Sum up.")
    head = len(other.prompt_ids)
    routed_turn(other, "d", 3)
    silent = begin(transcript, "Nothing.")
    rollout = transcript.rollout("r", "p", FinishReason.STOP)
    assert rollout.routed_experts is not None
    assert rollout.routed_experts.shape == (len(first.prompt_ids) + len(rollout.token_ids), 2, 1)
    numbers = rollout.routed_experts[:, 0, 0].tolist()
    assert numbers[: len(first.prompt_ids) + 1] == [1] * (len(first.prompt_ids) + 1)
    assert numbers[len(first.prompt_ids) + 1 : turn_of_two + 2] == [2] * (turn_of_two + 1 - len(first.prompt_ids))
    assert numbers[turn_of_two + 2 : end] == [255] * (end - turn_of_two - 2)
    assert numbers[end : end + head + 2] == [3] * (head + 1) + [255]
    assert numbers[end + head + 2 :] == [255] * len(silent.prompt_ids)


def test_a_response_without_experts_has_none() -> None:
    transcript = Transcript(TOKENIZER, make_prompt(TOKENIZER), ())
    say(transcript.current, "a")
    assert transcript.rollout("r", "p", FinishReason.STOP).routed_experts is None
