"""Conversations of every shape, made from a seed, and what must become of each under any chat template."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf.types import Json

SCRIPTS = (
    "",
    "",
    "",
    " \u65e5\u672c\u8a9e",
    " \U0001f642",
    " \u00e9\u00df",
    " \u0645\u0631\u062d\u0628\u0627",
    ' "quoted"',
    " a\\b",
    " {braces}",
    "\nsecond line",
    " <b>&amp;</b>",
)
SHORT = ("4", "ok", "a", "No.", "7 ", " yes", "\u662f", "0")
NAMES = ("weather", "f", "get_current_time", "search.web", "add2")


@dataclass(slots=True)
class Generated:
    """A row with a conversation. `said[i]` are the words that message i alone says; `thought[i]` those that it thinks;
    `learned` are the numbers of the assistant's messages that are learned."""

    row: dict[str, Json]
    said: dict[int, list[str]] = field(default_factory=dict)
    thought: dict[int, list[str]] = field(default_factory=dict)
    learned: list[int] = field(default_factory=list)
    tool_names: list[str] = field(default_factory=list)


def conversations(seed: int, number: int) -> Iterator[Generated]:
    """`number` conversations, always the same ones for a seed."""
    for index in range(number):
        yield Maker(random.Random(f"{seed}/{index}")).conversation()


class Maker:
    """Makes a conversation. Its words are unmistakable unless they are short ones, of which nothing is noted."""

    def __init__(self, random_: random.Random) -> None:
        self._random = random_
        self._words = 0
        self._made = Generated(row={})
        self._calls = 0

    def conversation(self) -> Generated:
        pick = self._random
        messages: list[Json] = []
        if pick.random() < 0.4:
            messages.append(self._message(len(messages), pick.choice(["system", "developer"])))
        tools = pick.random() < 0.45
        for _ in range(pick.choice([1, 1, 1, 2, 3])):
            messages.append(self._message(len(messages), "user"))
            if pick.random() < 0.05:
                messages.append(self._message(len(messages), pick.choice(["user", "system"])))
            while tools and pick.random() < 0.5:
                messages += self._call(len(messages))
            messages.append(self._answer(len(messages)))
            if pick.random() < 0.03:
                messages.append(self._answer(len(messages)))
        self._made.row = {"messages": messages}
        if tools and pick.random() < 0.8:
            self._made.row["tools"] = self._tools()
        return self._made

    def _word(self) -> str:
        self._words += 1
        return f"wq{self._words}qw"

    def _text(self, notes: list[str]) -> str:
        if self._random.random() < 0.2:
            return self._random.choice(SHORT)
        words = [self._word() for _ in range(self._random.randint(1, 3))]
        notes += words
        edge = self._random.choice(["", "", "", "", "\n", " "])
        return f"{edge}{words[0]}{self._random.choice(SCRIPTS)} {' '.join(words[1:])}"

    def _message(self, index: int, role: str) -> dict[str, Json]:
        text = self._text(self._made.said.setdefault(index, []))
        if self._random.random() < 0.05:
            return {"from": {"user": "human"}.get(role, role), "value": text}
        content: Json = text
        if self._random.random() < 0.1:
            content = [{"type": "text", "text": text}]
        message: dict[str, Json] = {"role": role, "content": content}
        if self._random.random() < 0.03:
            message["annotation"] = "x"
        return message

    def _answer(self, index: int) -> dict[str, Json]:
        message = self._message(index, "assistant")
        self._made.learned.append(index)
        kind = self._random.random()
        thoughts = self._made.thought.setdefault(index, [])
        if kind < 0.2:
            message[self._random.choice(["reasoning_content", "reasoning", "thinking"])] = self._text(thoughts)
        elif kind < 0.35 and "content" in message:
            text = message["content"]
            if isinstance(text, str):
                message["content"] = f"<think>\n{self._text(thoughts).strip()}\n</think>\n\n{text.lstrip()}"
        return message

    def _call(self, index: int) -> list[Json]:
        pick = self._random
        said = self._made.said.setdefault(index, [])
        content: Json = pick.choice([None, ""]) if pick.random() < 0.6 else self._text(said)
        calls: list[Json] = []
        replies: list[Json] = []
        for _ in range(pick.choice([1, 1, 1, 2])):
            self._calls += 1
            name, number = pick.choice(NAMES), f"call{self._calls:05d}"
            arguments = self._arguments(said)
            calls.append(
                {
                    "id": number,
                    "type": "function",
                    "function": {
                        "name": name,
                        "arguments": arguments if pick.random() < 0.6 else json.dumps(arguments),
                    },
                }
            )
            words: list[str] = self._made.said.setdefault(index + len(calls), [])
            as_json = pick.random() < 0.3
            reply = self._text(words)
            if as_json:
                reply = json.dumps({"result": reply.strip()}, ensure_ascii=pick.random() < 0.5)
            replies.append({"role": "tool", "tool_call_id": number, "name": name, "content": reply})
        message: dict[str, Json] = {"role": "assistant", "content": content, "tool_calls": calls}
        self._made.learned.append(index)
        if pick.random() < 0.2:
            message["reasoning_content"] = self._text(self._made.thought.setdefault(index, []))
        return [message, *replies]

    def _arguments(self, said: list[str]) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for _ in range(self._random.randint(0, 3)):
            word = self._word()
            said.append(word)
            found[word] = self._value(said)
        return found

    def _value(self, said: list[str]) -> Json:
        match self._random.randint(0, 5):
            case 0:
                return self._random.randint(0, 9)
            case 1:
                return 0.5
            case 2:
                return True
            case 3:
                return [self._text(said), 3]
            case 4:
                return {"inner": self._text(said)}
            case _:
                return self._text(said)

    def _tools(self) -> Json:
        tools: list[Json] = []
        for name in NAMES:
            self._made.tool_names.append(name)
            schema: Json = {
                "type": "object",
                "properties": {"town": {"type": "string", "description": f"where {name} looks"}},
            }
            tools.append(
                {"type": "function", "function": {"name": name, "description": f"does {name}", "parameters": schema}}
            )
        return tools if self._random.random() < 0.7 else json.dumps(tools)
