"""Records as token ids: prompts rendered, responses ended by a stop token, and a mask of what the assistant wrote."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf.config.data import DataSection
from rlhf.conversations.continuing import continued, up_to_stop
from rlhf.engines.base import Tokenizer
from rlhf.errors import DataError
from rlhf.orchestrator.data.dialogue import response_parts
from rlhf.orchestrator.data.problems import RowError
from rlhf.orchestrator.data.records import Record, Text, as_chat, as_messages, as_plain
from rlhf.types import BoolArray, FinishReason, IntArray, Json, Message, Prompt, Response, Reward, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a response's text, and whether the assistant wrote it."""

    text: str
    written: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedResponse:
    """A response's text and n tokens; `written[t]` is False inside other speakers' turns."""

    text: str
    token_ids: IntArray
    written: BoolArray


class Encoder:
    """Turns records into tokens by one config section and one tokenizer."""

    def __init__(self, section: DataSection, tokenizer: Tokenizer) -> None:
        self._section = section
        self._tokenizer = tokenizer
        tokens = sorted((re.escape(token) for token in tokenizer.control_tokens if token), key=len, reverse=True)
        self._control = re.compile("|".join(tokens)) if tokens and not section.allow_control_tokens else None

    def settle_kind(self, record: Record) -> Record:
        """The record as text or as messages, by data.template. Raises RowError."""
        self.refuse_control_tokens(record)
        if self._section.template == "chat":
            return as_chat(record)
        return as_plain(record) if self._section.template == "plain" else record

    def refuse_control_tokens(self, record: Record) -> None:
        """Raise RowError where a text holds a control token, which a tokenizer would take for the real one."""
        if self._control is None:
            return
        steps = [(step, f"step {number}") for number, step in enumerate(record.steps, 1)]
        for text, name in (*zip((record.prompt, *record.responses), record.names, strict=True), *steps):
            for message in as_messages(text):
                if found := self._control.search(message.content):
                    raise RowError(f"{name} holds the control token {found[0]}; use data.allow_control_tokens.")

    def prompt(self, record: Record) -> Prompt:
        """The prompt as the policy sees it. A chat prompt keeps its messages in the metadata; a column of that name
        beside a prompt is another conversation, and is left out."""
        metadata: dict[str, Json] = {name: value for name, value in record.metadata.items() if name != "messages"}
        if isinstance(record.prompt, str):
            text = self._section.prompt_format.replace("{prompt}", record.prompt) if record.prompt else ""
            token_ids = self._tokenizer.encode(text, add_special_tokens=True)
        else:
            text = self._render(record.prompt, add_generation_prompt=True)
            token_ids = self._tokenizer.encode(text)
            metadata["messages"] = [{"role": turn.role, "content": turn.content} for turn in record.prompt]
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
                text=self._tokenizer.decode(whole.token_ids[stretch].tolist()),
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
        return self._chat_parts(record.prompt, prompt.text, response)

    def _chat_parts(self, prompt: Sequence[Message], shown: str, response: Sequence[Message]) -> list[Part]:
        """What each turn adds to the rendered conversation. The template must only ever add."""
        turns = list(prompt)
        parts: list[Part] = []

        def extend(add_generation_prompt: bool) -> None:
            nonlocal shown
            text = self._render(turns, add_generation_prompt=add_generation_prompt)
            if not text.startswith(shown):
                raise RowError(f"the chat template rewrites what stands before messages[{len(turns) - 1}].")
            if len(text) > len(shown):
                parts.append(Part(text=text[len(shown) :], written=not add_generation_prompt))
            shown = text

        for turn in response:
            if turn.role == "assistant":
                extend(add_generation_prompt=True)
            turns.append(turn)
            if turn.role == "assistant":
                extend(add_generation_prompt=False)
        return parts

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.render(messages, add_generation_prompt=add_generation_prompt)
        except DataError as error:
            raise RowError(str(error)) from error


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
