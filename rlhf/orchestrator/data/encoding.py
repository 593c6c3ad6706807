"""Records as token ids: prompts rendered, responses ended by a stop token, and a mask of what the assistant wrote."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from rlhf.config.data import DataSection
from rlhf.conversations.continuing import continued, up_to_stop
from rlhf.conversations.lost import lost_messages, lost_tools
from rlhf.conversations.marked import marked
from rlhf.conversations.messages import as_json, texts_in
from rlhf.conversations.turns import LeftOutError, Part, RewrittenError, left_out, turn_parts
from rlhf.engines.base import Tokenizer
from rlhf.errors import DataError
from rlhf.orchestrator.data.dialogue import response_parts
from rlhf.orchestrator.data.problems import RowError
from rlhf.orchestrator.data.records import TOOLS, Record, Text, as_chat, as_messages, as_plain
from rlhf.types import BoolArray, FinishReason, IntArray, Json, Message, Prompt, Response, Reward, ScoredGroup

FIRST_PROMPT = "rlhf:first_prompt"
"""Key of a turn's metadata: the rendered prompt of its conversation."""
THOUGHTS = "the chat template leaves out what the assistant thought in earlier turns"
ONE_TURN = "the chat template rewrites earlier turns, so each of the assistant's turns is learned by itself"
TOOL_WORDS = "the chat template leaves out parts of the tools' descriptions"
REMEMBERED = 128
"""Conversations of which the rendered text is remembered: more than those of one row, each of which is asked for two or
three times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedResponse:
    """A response's text and n tokens; `written[t]` is False inside other speakers' turns."""

    text: str
    token_ids: IntArray
    written: BoolArray


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodePrompts:
    """How rows become prompts of responses of several turns: always through the chat template."""

    tools: Callable[[Mapping[str, Json]], tuple[Json, ...]]
    """A row's columns -> schemas of its tools. Raises RowError for a row that names no environment."""
    world_first: bool = False
    """Whether an environment may speak before the policy: prompts then leave open who does."""


class Encoder:
    """Turns records into tokens by one config section and one tokenizer."""

    def __init__(self, section: DataSection, tokenizer: Tokenizer, episodes: EpisodePrompts | None = None) -> None:
        self._section = section
        self._episodes = episodes
        self.notes: Counter[str] = Counter()
        """What templates left out of rows that are used nevertheless: how often."""
        self._tokenizer = tokenizer
        self._rendered: dict[tuple[tuple[Message, ...], str, bool], str] = {}
        tokens = sorted((re.escape(token) for token in tokenizer.control_tokens if token), key=len, reverse=True)
        self._control = re.compile("|".join(tokens)) if tokens and not section.allow_control_tokens else None

    def settle_kind(self, record: Record) -> Record:
        """The record as text or as messages, by data.template. Raises RowError."""
        self.refuse_control_tokens(record)
        if self._episodes is not None:
            if record.tools and not isinstance(record.prompt, str):
                raise RowError(f"{TOOLS}: the tools of a run are those of rollout.tools and rollout.environment.")
            return replace(as_chat(record), tools=self._episodes.tools(record.metadata))
        if self._section.template == "chat":
            return as_chat(record)
        if self._section.template == "plain":
            refuse_fields(record)
            return as_plain(record)
        return record

    def refuse_control_tokens(self, record: Record) -> None:
        """Raise RowError where a text holds a control token, which a tokenizer would take for the real one."""
        if self._control is None:
            return
        steps = [(step, f"step {number}") for number, step in enumerate(record.steps, 1)]
        for text, name in (*zip((record.prompt, *record.responses), record.names, strict=True), *steps):
            for message in as_messages(text):
                self._refuse_control_token(as_json(message), name)
        if not isinstance(record.prompt, str) or self._section.template == "chat":
            self._refuse_control_token(list(record.tools), TOOLS)

    def _refuse_control_token(self, value: Json, name: str) -> None:
        assert self._control is not None, "the caller asked"
        for text in texts_in(value):
            if found := self._control.search(text):
                raise RowError(f"{name} holds the control token {found[0]}; use data.allow_control_tokens.")

    def prompt(self, record: Record) -> Prompt:
        """The prompt as the policy sees it. A chat prompt keeps its messages in the metadata; a column of that name
        beside a prompt is another conversation, and is left out."""
        metadata: dict[str, Json] = {name: value for name, value in record.metadata.items() if name != "messages"}
        if isinstance(record.prompt, str):
            text = self._section.prompt_format.replace("{prompt}", record.prompt) if record.prompt else ""
            token_ids = self._tokenizer.encode(text, add_special_tokens=True)
        else:
            text = self._rendered_prompt(record, record.prompt)
            token_ids = self._tokenizer.encode(text)
            metadata["messages"] = [as_json(turn) for turn in record.prompt]
        return Prompt(
            id=record.id,
            token_ids=np.array(token_ids, dtype=np.int64),
            text=text,
            label=record.label,
            metadata=metadata,
        )

    def response(self, record: Record, prompt: Prompt, response: Text) -> EncodedResponse:
        """A response to `prompt`, up to and including its stop token.

        Parts are tokenized one by one and joined, the way they come about when a policy answers turn by turn: the
        tokens of a turn never depend on what follows.
        """
        parts = self._parts(record, prompt, response)
        token_ids: list[int] = []
        written: list[bool] = []
        before = prompt.text
        for part in parts:
            ids = continued(self._tokenizer.encode, before, part.text)
            learned = up_to_stop(ids, self._tokenizer.stop_token_ids) if part.written else 0
            token_ids += ids
            written += [True] * learned + [False] * (len(ids) - learned)
            before = part.text
        end = len(written) - written[::-1].index(True) if True in written else 0
        token_ids, written = token_ids[:end], written[:end]
        if not token_ids or token_ids[-1] not in self._tokenizer.stop_token_ids:
            token_ids.append(self._tokenizer.eos_token_id)
            written.append(True)
        return EncodedResponse(
            text="".join(part.text for part in parts) if isinstance(response, str) else response[-1].content,
            token_ids=np.array(token_ids, dtype=np.int64),
            written=np.array(written, dtype=np.bool_),
        )

    def by_turn(self, record: Record) -> list[Record]:
        """The record itself, where its chat template only ever adds to a conversation. Else a record for each of the
        assistant's turns, with what stands before it as the prompt: what is learned is what generation would see."""
        if isinstance(record.prompt, str) or len(record.responses) != 1:
            return [record]
        turns = [*record.prompt, *as_messages(record.responses[0])]
        answers = [n for n in range(len(record.prompt), len(turns)) if turns[n].role == "assistant"]
        if len(answers) < 2:
            return [record]
        try:
            turn_parts(
                lambda messages, add: self._render(messages, record.tools, add), record.prompt, turns[answers[0] :]
            )
        except RewrittenError:
            self.notes[ONE_TURN] += 1
            metadata = {**record.metadata, FIRST_PROMPT: self._render(record.prompt, record.tools, True)}
            whole = replace(record, metadata=metadata)
            return [
                replace(whole, id=f"{record.id}#{n}", prompt=tuple(turns[:n]), responses=((turns[n],),))
                for n in answers
            ]
        except LeftOutError as error:
            raise RowError(str(error)) from error
        return [record]

    def steps(self, record: Record, prompt: Prompt) -> EncodedResponse:
        """The record's steps, each ending in the separator; `written` is True at the last token of each.

        Like turns, steps are tokenized one by one: the tokens of a step never depend on what follows.
        """
        separator = self._section.step_separator
        texts = [step.removesuffix(separator) + separator for step in record.steps]
        token_ids: list[int] = []
        ends: list[bool] = []
        for before, text in zip([prompt.text, *texts], texts, strict=False):
            ids = continued(self._tokenizer.encode, before, text)
            token_ids += ids
            ends += [False] * (len(ids) - 1) + [True]
        return EncodedResponse(
            text="".join(texts),
            token_ids=np.array(token_ids, dtype=np.int64),
            written=np.array(ends, dtype=np.bool_),
        )

    def blocks(self, record: Record, prompt: Prompt, max_tokens: int) -> list[EncodedResponse]:
        """A plain text in blocks of at most `max_tokens`; only the last one ends."""
        whole = self.response(record, prompt, record.responses[0])
        if len(whole.token_ids) <= max_tokens:
            return [whole]
        stretches = [slice(start, start + max_tokens) for start in range(0, len(whole.token_ids), max_tokens)]
        return [
            EncodedResponse(
                text=self._tokenizer.decode(whole.token_ids[stretch]),
                token_ids=whole.token_ids[stretch],
                written=whole.written[stretch],
            )
            for stretch in stretches
        ]

    def _parts(self, record: Record, prompt: Prompt, response: Text) -> list[Part]:
        if isinstance(response, str):
            pieces = response_parts(response) if record.dialogue else [(response, True)]
            return [Part(text=text, written=written) for text, written in pieces]
        assert not isinstance(record.prompt, str), "a record is all text or all messages"
        return self._chat_parts(record, record.prompt, as_messages(response))

    def _chat_parts(self, record: Record, prompt: Sequence[Message], response: Sequence[Message]) -> list[Part]:
        """What each turn adds to the rendered conversation. The template must show each one whole, marked ones too."""

        def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            return self._render(messages, record.tools, add_generation_prompt)

        try:
            parts = turn_parts(render, prompt, response)
            conversation, tools = marked([*prompt, *response], record.tools)
            with suppress(RowError, RewrittenError):
                # A mark may be what a template refuses; the row itself was fine.
                turn_parts(
                    lambda messages, add: self._render(messages, tools, add),
                    conversation[: len(prompt)],
                    conversation[len(prompt) :],
                )
        except (LeftOutError, RewrittenError) as error:
            raise RowError(str(error)) from error
        return parts

    def _rendered_prompt(self, record: Record, prompt: Sequence[Message]) -> str:
        """A prompt through the chat template. All of it is shown but what an assistant once thought, which is counted.
        Raises RowError."""
        answered = self._episodes is None or not self._episodes.world_first
        text = self._render(prompt, record.tools, answered)
        thoughts = self._refuse_lost(prompt, record.tools, text)
        conversation, tools = marked(prompt, record.tools)
        shown: str | None = None
        with suppress(RowError):
            shown = self._render(conversation, tools, answered)
        if shown is not None:
            thoughts |= self._refuse_lost(conversation, tools, shown)
        _, unsaid = lost_tools(record.tools, text)
        self.notes.update([THOUGHTS] * thoughts + [TOOL_WORDS] * (unsaid > 0))
        return text

    def _refuse_lost(self, messages: Sequence[Message], tools: Sequence[Json], text: str) -> bool:
        """Raise RowError where a text shows less than all that was said. Returns whether thoughts are missing."""
        lost = lost_messages(messages, text)
        if said := [one for one in lost if not one.thought]:
            raise RowError(left_out(said, 0))
        hidden, _ = lost_tools(tools, text)
        if hidden:
            raise RowError(f"the chat template leaves out {TOOLS}[{hidden[0]}].")
        return bool(lost)

    def _render(self, messages: Sequence[Message], tools: Sequence[Json], add_generation_prompt: bool) -> str:
        key = (tuple(messages), json.dumps(tools), add_generation_prompt)
        if key not in self._rendered:
            try:
                text = self._tokenizer.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
            except DataError as error:
                raise RowError(str(error)) from error
            if len(self._rendered) == REMEMBERED:
                self._rendered.clear()
            self._rendered[key] = text
        return self._rendered[key]


def refuse_fields(record: Record) -> None:
    """Raise RowError where messages hold more than the text that data.template=plain keeps."""
    for text, name in zip((record.prompt, *record.responses), record.names, strict=True):
        for index, message in enumerate(as_messages(text)):
            if fields := [key for key in message.fields if key not in ("name", "tool_call_id")]:
                raise RowError(f"{name}[{index}] holds {', '.join(fields)}, which need data.template=chat.")
    if record.tools and not isinstance(record.prompt, str):
        raise RowError(f"{TOOLS} need data.template=chat.")


def cut(response: EncodedResponse, max_tokens: int) -> EncodedResponse:
    """At most the first `max_tokens` tokens of a response; its text stays."""
    return EncodedResponse(
        text=response.text, token_ids=response.token_ids[:max_tokens], written=response.written[:max_tokens]
    )


def cut_steps(response: EncodedResponse, max_tokens: int) -> EncodedResponse:
    """The whole steps among the first `max_tokens` tokens; the text stays."""
    ends = np.flatnonzero(response.written) + 1
    return cut(response, int(ends[ends <= max_tokens].max(initial=0)))


def as_steps(prompt: Prompt, encoded: EncodedResponse, is_whole: bool, record: Record) -> ScoredGroup:
    """Labeled steps as a scored group of one response: its `loss_mask` is True at the end of each step, `step_labels`
    say how good these are, and the reward is their mean."""
    labels = record.step_labels[: int(encoded.written.sum())]
    response = Response(
        id=f"{prompt.id}/0",
        prompt_id=prompt.id,
        token_ids=encoded.token_ids,
        finish_reason=FinishReason.STOP if is_whole else FinishReason.LENGTH,
        loss_mask=encoded.written,
        step_labels=labels,
    )
    mean = sum(labels) / len(labels)
    return ScoredGroup(prompt=prompt, responses=(response,), texts=(encoded.text,), rewards=(Reward(total=mean),))


def as_labels(group: ScoredGroup) -> list[ScoredGroup]:
    """A pair as two groups of one response each: the better one is good (reward 1), the worse one is not (0)."""
    return [
        ScoredGroup(
            prompt=replace(group.prompt, id=f"{group.prompt.id}#{name}"),
            responses=(replace(response, id=f"{group.prompt.id}#{name}/0", prompt_id=f"{group.prompt.id}#{name}"),),
            texts=(text,),
            rewards=(Reward(total=float(label)),),
            labels=(label,),
        )
        for name, label, response, text in zip(
            ("chosen", "rejected"), (True, False), group.responses, group.texts, strict=True
        )
    ]


def as_group(prompt: Prompt, encoded: Sequence[EncodedResponse], whole: Sequence[bool], record: Record) -> ScoredGroup:
    """A data set's responses as a scored group: K responses get rewards K-1 ... 0, a labeled one 1 or 0.

    `whole[i]` is False where response i was cut.
    """
    best = len(encoded) - 1 if record.desirable is None else int(record.desirable)
    responses = tuple(
        Response(
            id=f"{prompt.id}/{index}",
            prompt_id=prompt.id,
            token_ids=one.token_ids,
            finish_reason=FinishReason.STOP if is_whole else FinishReason.LENGTH,
            loss_mask=None if one.written.all() else one.written,
        )
        for index, (one, is_whole) in enumerate(zip(encoded, whole, strict=True))
    )
    return ScoredGroup(
        prompt=prompt,
        responses=responses,
        texts=tuple(one.text for one in encoded),
        rewards=tuple(Reward(total=float(best - index)) for index in range(len(encoded))),
        margins=record.margins,
        labels=() if record.desirable is None else (record.desirable,),
    )
