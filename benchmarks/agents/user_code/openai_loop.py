"""A loop of one's own by the client of OpenAI: it has the calculator, and answers the policy's calls itself."""

import json
from typing import Any

from openai import AsyncOpenAI

from rlhf.environments.agent import AgentSession

NUMBER = {"type": "integer"}
PARAMETERS = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]}
MULTIPLY = {"name": "multiply", "description": "Multiply two whole numbers.", "parameters": PARAMETERS}
TOOLS: list[Any] = [{"type": "function", "function": MULTIPLY}]
CLIENT = AsyncOpenAI(base_url="http://127.0.0.1", api_key="none")
"""Each session has a copy of it: making a client anew takes 20 ms of CPU time."""


async def run(session: AgentSession, row: dict[str, Any]) -> float:
    client = CLIENT.with_options(base_url=session.base_url, api_key=session.api_key)
    messages: list[Any] = list(row["messages"])
    while True:
        reply = await client.chat.completions.create(model=session.model, messages=messages, tools=TOOLS)
        said = reply.choices[0].message
        messages.append(said)
        if not said.tool_calls:
            return float((said.content or "").split()[-1:] == [row["label"]])
        for call in said.tool_calls:
            given = call.function.arguments if call.type == "function" else "{}"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": multiplied(json.loads(given))})


def multiplied(given: dict[str, Any]) -> str:
    """The product as the policy reads it."""
    try:
        return str(int(given["a"]) * int(given["b"]))
    except (KeyError, TypeError, ValueError):
        return "error"
