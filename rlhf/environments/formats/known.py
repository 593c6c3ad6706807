"""The forms of turns that are known, and which of them a chat template writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf.conversations.lost import lost_messages
from rlhf.conversations.messages import REASONING
from rlhf.conversations.turns import LeftOutError, RewrittenError, answer_text
from rlhf.engines.base import Tokenizer
from rlhf.environments.calls import NO_CALLS, Call, CallFormat, apart, keep_thoughts
from rlhf.environments.formats.gemma import read_gemma
from rlhf.environments.formats.harmony import harmony_message, read_harmony
from rlhf.environments.formats.json_calls import read_deepseek, read_hermes, read_llama, read_mistral
from rlhf.environments.formats.tagged import read_glm, read_qwen
from rlhf.errors import DataError, ModelError
from rlhf.types import Json, Message

FORMATS: Mapping[str, CallFormat] = {
    "Hermes and Qwen 3": CallFormat(read=read_hermes, beside=keep_thoughts),
    "Llama 3": CallFormat(read=read_llama),
    "Qwen 3.5 and Qwen 3 Coder": CallFormat(read=read_qwen, beside=keep_thoughts),
    "GLM 4.5": CallFormat(read=read_glm, beside=keep_thoughts),
    "DeepSeek": CallFormat(read=read_deepseek, beside=keep_thoughts),
    "Mistral": CallFormat(read=read_mistral),
    "Gemma 4": CallFormat(read=read_gemma),
    "gpt-oss": CallFormat(read=read_harmony, message=harmony_message),
}
"""The form of a model is the one in which its template writes turns."""
QUESTION = Message(role="user", content="What is 2 + 2?")
ANSWER = "It is four, I believe."
CALL = Call(name="lookup", arguments={"key": "some words", "count": 3}, id="call00000")
"""Nine letters and digits as the id, as the strictest templates want them."""
RESULT = Message(role="tool", content="found", fields={"name": CALL.name, "tool_call_id": CALL.id})


def find_format(tokenizer: Tokenizer, tools: Sequence[Json]) -> CallFormat:
    """The form in which the chat template writes turns, with calls where there are tools. Raises ModelError if it
    writes calls in none that is known."""
    if not tools:
        return _of_answers(tokenizer)
    written = _calls(tokenizer, tools)
    text = written[0].text
    found = next((one for one in FORMATS.values() if one.read(text, tools).calls == (CALL,)), None)
    if found is None:
        shown = " ".join(text.split())[:160]
        raise ModelError(
            f"rollout.tools: the chat template writes calls in a form that is not read here ({shown}). Those of "
            f"{', '.join(FORMATS)} are; set data.chat_template."
        )
    in_parts = replace(found, message=apart)
    if found.takes_apart or _takes(tokenizer, tools, found, written) or not _takes(tokenizer, tools, in_parts, written):
        return found
    return in_parts


def rewritten_turn(tokenizer: Tokenizer, tools: Sequence[Json], role: str) -> str:
    """How the chat template rewrites a turn once a message of `role` follows: a call before a tool's, an answer before
    a user's. Empty where it does not. Raises ModelError where it takes no such message."""
    form = find_format(tokenizer, tools)
    reply = RESULT if role == "tool" else Message(role=role, content="Then what is 3 + 3?")
    answer = _answer(tokenizer, tools) if form.takes_apart else Written(text=ANSWER, end="")
    turns = _calls(tokenizer, tools) if role == "tool" else [answer]
    try:
        found = [_departure(tokenizer, tools, form, turn, reply) for turn in turns]
    except DataError as error:
        raise ModelError(f"rollout: the chat template takes no {role} message after an answer: {error}") from error
    return "" if "" in found else found[0]


def difference(sampled: str, rendered: str) -> str:
    """Where the template departs from what was sampled."""
    place = next((n for n, (a, b) in enumerate(zip(sampled, rendered, strict=False)) if a != b), len(rendered))
    shown = [repr(text[place : place + 20]) for text in (sampled, rendered)]
    return f"it writes {shown[1]} where {shown[0]} was sampled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A turn as the chat template writes it, and the text of the token that ends it; empty where none does."""

    text: str
    end: str


def written_turn(tokenizer: Tokenizer, tools: Sequence[Json], turn: Message) -> Written:
    """What the template writes for a turn after `QUESTION`. Raises DataError, RewrittenError and LeftOutError."""

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return tokenizer.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    text = answer_text(render, [QUESTION], turn, render([QUESTION], True))
    stops = [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.stop_token_ids]
    ends = [(place, stop) for stop in stops if stop and (place := text.find(stop)) >= 0]
    if ends:
        place, end = min(ends)
        return Written(text=text[:place], end=end)
    # Some templates end a turn with the beginning of the next one.
    reply = RESULT if turn.fields.get("tool_calls") else QUESTION
    try:
        after = render([QUESTION, turn, reply], True).partition(text)[2]
    except DataError:
        after = ""
    return Written(text=text, end=next((stop for stop in stops if stop and after.startswith(stop)), ""))


def _calls(tokenizer: Tokenizer, tools: Sequence[Json]) -> list[Written]:
    """A call, and one after thoughts: some templates take calls only with them, or keep no empty ones. Raises
    ModelError where the template writes neither."""
    called: Json = [
        {"type": "function", "id": CALL.id, "function": {"name": CALL.name, "arguments": CALL.arguments}},
    ]
    written: list[Written] = []
    refused: list[Exception] = []
    for thoughts in ({}, {REASONING[0]: "So."}):
        turn = Message(role="assistant", content="", fields={**thoughts, "tool_calls": called})
        try:
            written.append(written_turn(tokenizer, tools, turn))
        except (DataError, RewrittenError, LeftOutError) as error:
            refused.append(error)
    if not written:
        raise ModelError(f"rollout.tools: the chat template writes no calls of tools ({refused[0]}).") from refused[0]
    return written


def _of_answers(tokenizer: Tokenizer) -> CallFormat:
    """The form of turns without calls: the text, unless the template puts it into a channel."""
    content = _answer(tokenizer, ()).text
    forms = [one for one in FORMATS.values() if one.takes_apart and one.read(content, ()).text == ANSWER]
    return forms[0] if content != ANSWER and forms else NO_CALLS


def _takes(tokenizer: Tokenizer, tools: Sequence[Json], form: CallFormat, turns: Sequence[Written]) -> bool:
    """Whether the template writes one of the turns, given in a form, as it is, with a tool's result after it."""
    for turn in turns:
        try:
            if not _departure(tokenizer, tools, form, turn, RESULT):
                return True
        except DataError:
            continue
    return False


def _departure(tokenizer: Tokenizer, tools: Sequence[Json], form: CallFormat, turn: Written, reply: Message) -> str:
    """How the template departs from a turn once `reply` follows; empty where it does not. Raises DataError where the
    conversation cannot go on."""
    before = tokenizer.render([QUESTION], add_generation_prompt=True, tools=tools)
    given = form.message(form.read(turn.text, tools), turn.text)
    after = tokenizer.render([QUESTION, given, reply], add_generation_prompt=True, tools=tools)
    # Some templates refuse a turn only once another one follows.
    further = [Message(role="assistant", content=ANSWER), QUESTION]
    tokenizer.render([QUESTION, given, reply, *further], add_generation_prompt=True, tools=tools)
    expected = before + turn.text + turn.end
    if not after.startswith(expected):
        return difference(expected, after)
    return "it leaves out what came back" if lost_messages([reply], after[len(expected) :]) else ""


def _answer(tokenizer: Tokenizer, tools: Sequence[Json]) -> Written:
    """An answer; the bare text where the template rewrites prompts."""
    try:
        return written_turn(tokenizer, tools, Message(role="assistant", content=ANSWER))
    except (DataError, RewrittenError, LeftOutError):
        return Written(text=ANSWER, end="")
