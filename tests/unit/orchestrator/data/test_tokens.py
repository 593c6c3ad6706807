"""Responses as tokens: where they end, what is learned of them, what is cut; and what a limit does."""

from pathlib import Path

import numpy as np
import pytest

from rlhf.errors import DataError
from rlhf.orchestrator.data import load_prompts
from rlhf.types import FinishReason, Json, Response
from tests.unit.orchestrator.data.data_support import (
    CHAT,
    PLAIN,
    LetterTokenizer,
    complaints,
    load_demonstrations,
    load_preferences,
    load_texts,
    section,
    write_rows,
)

CONVERSATION: list[Json] = [
    {"role": "system", "content": "be nice"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "twelve"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "bye"},
]


def learned(rollout: Response) -> str:
    """The text of the tokens that are learned."""
    mask = np.ones(len(rollout.token_ids), dtype=bool) if rollout.loss_mask is None else rollout.loss_mask
    return CHAT.decode(rollout.token_ids[mask].tolist(), skip_special_tokens=False)


def test_a_plain_response_ends_with_eos_which_is_learned(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "hi", "response": "yo"}])
    (group,) = load_demonstrations(section(path), PLAIN).train
    (rollout,) = group.responses
    assert group.prompt.token_ids.tolist() == PLAIN.encode("hi", add_special_tokens=True)
    assert rollout.token_ids.tolist() == [*PLAIN.encode("yo"), PLAIN.eos_token_id]
    assert (rollout.loss_mask, rollout.finish_reason) == (None, FinishReason.STOP)
    assert group.rollouts == ()


def test_a_chat_response_ends_with_the_turns_own_end(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"messages": CONVERSATION[:3]}])
    (group,) = load_demonstrations(section(path), CHAT).train
    text = CHAT.decode([*group.prompt.token_ids, *group.responses[0].token_ids], skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>"
    )
    assert learned(group.responses[0]) == "yo<|im_end|>"


def test_of_several_turns_only_the_assistants_are_learned(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"messages": CONVERSATION}])
    (group,) = load_demonstrations(section(path), CHAT).train
    (rollout,) = group.responses
    assert learned(rollout) == "yo<|im_end|>twelve<|im_end|>bye<|im_end|>"
    assert group.texts == ("bye",)
    whole = CHAT.decode([*group.prompt.token_ids, *rollout.token_ids], skip_special_tokens=False)
    messages = [turn for turn in group.prompt.metadata["messages"]]  # type: ignore[union-attr]
    assert messages == CONVERSATION[:2]
    assert whole.count("<|im_start|>") == len(CONVERSATION)
    assert whole.endswith("bye<|im_end|>")


def test_a_template_without_an_end_of_turn_gets_eos(tmp_path: Path) -> None:
    class Bare(LetterTokenizer):
        def render(self, messages: object, *, add_generation_prompt: bool, tools: object = ()) -> str:
            text = "".join(f"[{turn.role}]{turn.content}" for turn in messages)  # type: ignore[attr-defined]
            return text + ("[assistant]" if add_generation_prompt else "")

    path = write_rows(tmp_path / "t.jsonl", [{"messages": [CONVERSATION[1], CONVERSATION[2]]}])
    (group,) = load_demonstrations(section(path), Bare(chat=True)).train
    assert learned(group.responses[0]) == "yo</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused_by_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"messages": CONVERSATION[:3]}, {"messages": CONVERSATION}])
    with pytest.raises(DataError) as error:
        load_demonstrations(section(path), LetterTokenizer(chat=True, strips_history=True))
    assert complaints(error)[-1] == "t.jsonl:2: the chat template leaves out part of messages[0] (its content)."


def test_tokens_that_merge_inside_a_response_do_and_across_its_border_do_not(tmp_path: Path) -> None:
    merging = LetterTokenizer(merges=["ab"])
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "xa", "response": "bab"}, {"prompt": "x", "response": "ab"}])
    first, second = load_demonstrations(section(path), merging).train
    assert first.prompt.token_ids.tolist() == merging.encode("xa", add_special_tokens=True)
    assert first.responses[0].token_ids.tolist() == [100 + ord("b"), 4, 1]
    assert second.responses[0].token_ids.tolist() == [4, 1]


def test_a_tokenizer_that_begins_each_text_with_a_space_does_so_once(tmp_path: Path) -> None:
    class Spacing(LetterTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
            return super().encode(f"_{text}", add_special_tokens=add_special_tokens)

    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "hi", "response": "yo"}])
    (group,) = load_demonstrations(section(path), Spacing()).train
    whole = [*group.prompt.token_ids, *group.responses[0].token_ids]
    assert PLAIN.decode(whole, skip_special_tokens=False) == "<s>_hiyo</s>"


def test_chosen_and_rejected_share_one_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "chosen": "a", "rejected": "b"}]
    (group,) = load_preferences(section(write_rows(tmp_path / "t.jsonl", rows)), PLAIN).train
    assert [rollout.id for rollout in group.responses] == ["t.jsonl:1/0", "t.jsonl:1/1"]
    assert {rollout.prompt_id for rollout in group.responses} == {group.prompt.id}


def test_overlong_prompts_are_one_problem_with_the_first_places(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (11 if number in (1, 3, 4) else 9)} for number in range(5)]
    path = write_rows(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError) as error:
        load_prompts(section(path), PLAIN, 10)
    assert complaints(error) == ["data: 3 of 5 prompts exceed 10 tokens (first: t.jsonl:2, 4). Use data.overlong=drop."]
    for overlong in ("drop", "truncate"):
        split = load_prompts(section(path, overlong=overlong), PLAIN, 10)
        assert [prompt.id for prompt in split.train] == ["t.jsonl:1", "t.jsonl:3"]
        assert split.dropped == {"over the token limit": 3}


def test_a_prompt_of_just_the_limit_is_kept(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "x" * 9}])
    assert len(load_prompts(section(path), PLAIN, 10).train[0].token_ids) == 10


def test_overlong_responses_are_refused_dropped_or_cut(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response": "abcdef"},
        {"prompt": "q", "response": "ab"},
        {"prompt": "r" * 9, "response": "a"},
    ]
    path = write_rows(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match=r"2 of 3 rows exceed 6 tokens \(data.max_tokens\) \(first: t.jsonl:1, 3\)"):
        load_demonstrations(section(path, max_tokens=6), PLAIN)
    dropped = load_demonstrations(section(path, max_tokens=6, overlong="drop"), PLAIN)
    assert [group.prompt.text for group in dropped.train] == ["q"]
    cut = load_demonstrations(section(path, max_tokens=6, overlong="truncate"), PLAIN)
    rollouts = [group.responses[0] for group in cut.train]
    assert [PLAIN.decode(rollout.token_ids.tolist(), skip_special_tokens=False) for rollout in rollouts] == [
        "abcd",
        "ab</s>",
    ]
    assert [rollout.finish_reason for rollout in rollouts] == [FinishReason.LENGTH, FinishReason.STOP]
    assert cut.dropped == {"over the token limit": 1}


def test_pairs_that_are_the_same_once_cut_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "abcdef", "rejected": "abcdeg"},
        {"prompt": "p", "chosen": "abcdef", "rejected": "bbcdeg"},
    ]
    path = write_rows(tmp_path / "t.jsonl", rows)
    split = load_preferences(section(path, max_tokens=6, overlong="truncate"), PLAIN)
    assert [group.prompt.id for group in split.train] == ["t.jsonl:2"]
    assert split.dropped == {"responses the same once tokenized and cut": 1}


def test_texts_are_cut_into_blocks_that_lose_nothing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"text": "abcdefgh"}, {"text": "xy"}])
    split = load_texts(section(path, max_tokens=5), PLAIN)
    texts = [PLAIN.decode(group.responses[0].token_ids.tolist(), skip_special_tokens=False) for group in split.train]
    assert texts == ["abcd", "efgh", "</s>", "xy</s>"]
    assert {tuple(group.prompt.token_ids.tolist()) for group in split.train} == {(0,)}
    assert len({group.prompt.id for group in split.train}) == 4
    reasons = [group.responses[0].finish_reason for group in split.train]
    assert reasons == [FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.STOP, FinishReason.STOP]


def test_plain_texts_are_demonstrations_without_a_prompt(tmp_path: Path) -> None:
    """As in language modeling: every token is learned, under data.max_tokens as for other rows."""
    path = write_rows(tmp_path / "t.jsonl", [{"text": "abcdefgh"}, {"text": "xy"}])
    for template in ("auto", "plain", "chat"):
        split = load_demonstrations(section(path, max_tokens=12, template=template), CHAT)
        assert [(group.prompt.text, group.texts) for group in split.train] == [("", ("abcdefgh",)), ("", ("xy",))]
        assert all(group.responses[0].loss_mask is None for group in split.train)
        assert all(group.responses[0].finish_reason is FinishReason.STOP for group in split.train)
    held_out = load_demonstrations(section(path, eval_fraction=0.5), CHAT)
    assert (len(held_out.train), len(held_out.held_out)) == (1, 1)
    with pytest.raises(DataError, match=r"1 of 2 rows exceed 5 tokens"):
        load_demonstrations(section(path, max_tokens=5), CHAT)
    (short,) = load_demonstrations(section(path, max_tokens=5, overlong="drop"), CHAT).train
    assert short.texts == ("xy",)


def test_demonstrations_serve_as_texts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "hi", "response": "yo"}])
    (group,) = load_texts(section(path), PLAIN).train
    assert (group.prompt.text, group.texts) == ("hi", ("yo",))
