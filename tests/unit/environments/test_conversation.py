"""Exact tokens: what was sampled stays, and the conversation is what the chat template makes of it, or it is sealed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.engines.models.tokenizer import HfTokenizer
from rlhf.environments.conversation import Conversation, SealedError
from rlhf.environments.transcript import Transcript
from rlhf.types import FinishReason, Json, Message, Rollout
from tests.unit.environments.support import FORGETFUL, HERMES, LLAMA, SPECIAL, byte_tokenizer, make_prompt

TOOLS: list[Json] = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
TOKENIZERS = {name: byte_tokenizer(template) for name, template in (("hermes", HERMES), ("llama", LLAMA))}
END = "<|im_end|>"
CHARACTERS = st.characters(codec="utf-8")
TEXT = st.text(CHARACTERS, max_size=30).filter(lambda text: not any(token in text for token in SPECIAL))
WORLD = st.text(CHARACTERS, min_size=1, max_size=30)
TURNS = st.lists(
    st.tuples(TEXT, st.lists(st.tuples(st.sampled_from(["tool", "user"]), WORLD), min_size=1, max_size=3)), max_size=4
)


def sampled(tokenizer: HfTokenizer, text: str, *, end: str = END, version: int = 0) -> Rollout:
    ids = np.array(tokenizer.encode(text + end), dtype=np.int64)
    return Rollout(
        id="r",
        prompt_id="p",
        token_ids=ids,
        log_probs=-np.arange(1, len(ids) + 1, dtype=np.float32),
        finish_reason=FinishReason.STOP if end else FinishReason.LENGTH,
        weight_version=version,
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(turns=TURNS, last=TEXT, reasoning=st.booleans())
def test_rendering_a_conversation_gives_the_tokens_that_were_trained_on(
    name: str, turns: list[tuple[str, list[tuple[str, str]]]], last: str, reasoning: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    prompt = make_prompt(tokenizer, "Go.", tools=TOOLS)
    transcript = Transcript(tokenizer, prompt, TOOLS)
    talk = transcript.current
    own: list[int] = []
    said_by_model = [last, *(text for text, _ in turns if not reasoning)]
    for text, replies in turns:
        turn = sampled(tokenizer, f"<think>{text}</think>{text}" if reasoning else text)
        own += turn.token_ids.tolist()
        talk.add_turn(turn)
        said = [Message(role=role, content=talk.clean(reply)) for role, reply in replies]
        try:
            talk.add_world(said, *talk.world_tokens(said))
        except SealedError:
            break
    else:
        turn = sampled(tokenizer, last)
        own += turn.token_ids.tolist()
        talk.add_turn(turn)
    whole = [*prompt.token_ids.tolist(), *talk.token_ids.tolist()]
    assert tokenizer.decode(whole, skip_special_tokens=False) == talk.rendered_text, "the tokens are the text"
    if not any(turn[:1].isspace() for turn in said_by_model):
        # A space at the beginning of a turn could be one token with the end of the prompt, where it was sampled alone.
        assert tokenizer.encode(talk.rendered_text) == whole, "the text is the tokens"
    rollout = transcript.rollout("r", "p", FinishReason.STOP)
    mask = np.ones(len(own), dtype=np.bool_) if rollout.loss_mask is None else rollout.loss_mask
    assert rollout.token_ids[mask].tolist() == own, "what was sampled is learned from, and nothing else"
    assert not rollout.log_probs[~mask].any()
    assert (rollout.log_probs[mask] < 0).all()
    if talk.messages[-1].role == "assistant" and not _is_trimmed(name, talk.messages[-1].content):
        again = tokenizer.render(talk.messages, add_generation_prompt=False, tools=TOOLS)
        assert again.startswith(talk.rendered_text), "the chat template writes the same"


def _is_trimmed(name: str, text: str) -> bool:
    return name == "llama" and text != text.strip()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 261), min_size=1, max_size=30))
def test_tokens_that_no_text_encodes_to_stay_as_they_were_sampled(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["hermes"]
    prompt = make_prompt(tokenizer)
    talk = Conversation.of_prompt(tokenizer, prompt, ())
    end = tokenizer.encode(END)
    turn = Rollout(
        id="r",
        prompt_id="p",
        token_ids=np.array([*ids, *end], dtype=np.int64),
        log_probs=np.zeros(len(ids) + 1, dtype=np.float32),
        finish_reason=FinishReason.STOP,
        weight_version=0,
    )
    talk.add_turn(turn)
    said = [Message(role="user", content="on")]
    talk.add_world(said, *talk.world_tokens(said))
    assert talk.request_ids.tolist()[: len(prompt.token_ids) + len(ids) + 1] == [*prompt.token_ids, *ids, *end]


@pytest.mark.parametrize(
    ("template", "text", "end", "why"),
    [
        (LLAMA, "  spaces ", END, "it writes 'spaces"),
        (FORGETFUL, "<think>so</think>4", END, "it writes '4<"),
        (HERMES, "4", "<|end|>", "it writes 'im_end|>"),
    ],
)
def test_what_the_template_would_write_in_another_way_is_sealed(template: str, text: str, end: str, why: str) -> None:
    tokenizer = byte_tokenizer(template)
    talk = Conversation.of_prompt(tokenizer, make_prompt(tokenizer), ())
    talk.add_turn(sampled(tokenizer, text, end=end))
    with pytest.raises(SealedError) as caught:
        talk.world_tokens([Message(role="user", content="and?")])
    assert str(caught.value).startswith(why)
    assert len(talk) == len(tokenizer.encode(text + end)), "the sampled turn is kept"


def test_what_a_tool_returns_ends_no_turn() -> None:
    tokenizer = TOKENIZERS["hermes"]
    talk = Conversation.of_prompt(tokenizer, make_prompt(tokenizer), ())
    cleaned = talk.clean("a<|im_end|>b<|end|>")
    assert cleaned == "a< |im_end|>b< |end|>"
    assert not set(tokenizer.encode(cleaned)) & set(tokenizer.stop_token_ids)


def test_the_middle_of_a_long_text_is_left_out() -> None:
    talk = Conversation.of_prompt(TOKENIZERS["hermes"], make_prompt(TOKENIZERS["hermes"]), ())
    assert talk.cut("0123456789", 10) == "0123456789"
    assert talk.cut("0123456789", 5) == "012\n[5 tokens left out]\n89"
