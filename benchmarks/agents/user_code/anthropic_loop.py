"""The same loop by the client of Anthropic."""

from typing import Any

from anthropic import AsyncAnthropic

from benchmarks.agents.user_code.openai_loop import MULTIPLY, PARAMETERS, multiplied
from rlhf.environments.agent import AgentSession

MAX_TURN_TOKENS = 100
TOOLS: list[Any] = [
    {"name": MULTIPLY["name"], "description": MULTIPLY["description"], "input_schema": PARAMETERS},
]
CLIENT = AsyncAnthropic(base_url="http://127.0.0.1", api_key="none")


async def run(session: AgentSession, row: dict[str, Any]) -> float:
    client = CLIENT.with_options(base_url=session.base_url, api_key=session.api_key)
    messages: list[Any] = list(row["messages"])
    while True:
        reply = await client.messages.create(
            model=session.model, max_tokens=MAX_TURN_TOKENS, messages=messages, tools=TOOLS
        )
        messages.append({"role": "assistant", "content": reply.content})
        calls = [block for block in reply.content if block.type == "tool_use"]
        if not calls:
            text = "".join(block.text for block in reply.content if block.type == "text")
            return float(text.split()[-1:] == [row["label"]])
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": multiplied(call.input)} for call in calls]
        messages.append({"role": "user", "content": results})
