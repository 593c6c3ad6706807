"""Anthropic's messages: requests read, answers and errors written, by way of OpenAI's form of messages.

Source: Anthropic API reference, "Create a Message".
"""

import json
from collections.abc import Mapping
from typing import cast

from rlhf.environments import openai_api
from rlhf.environments.chat import ChatAnswer, ChatError, ChatRequest, refuse
from rlhf.types import FinishReason, Json

PATH = "messages"
NEUTRAL: Mapping[str, tuple[Json, ...]] = {
    "stream": (False,),
    "stop_sequences": ([],),
    "tool_choice": ({"type": "auto"}, {"type": "none"}),
    "thinking": ({"type": "disabled"},),
    "top_k": (0,),
}
"""As `openai_api.NEUTRAL`."""


def read(body: Mapping[str, Json]) -> ChatRequest:
    """A request. Raises ChatError."""
    refuse(body, NEUTRAL)
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise ChatError("messages is not a list of messages")
    messages = [one for n, item in enumerate(given) for one in _messages(item, f"messages[{n}]")]
    if system := _text(body.get("system"), "system"):
        messages.insert(0, {"role": "system", "content": system})
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise ChatError("tools is not a list of tools")
    converted: dict[str, Json] = {
        "messages": cast(Json, messages),
        "tools": [_tool(tool, f"tools[{n}]") for n, tool in enumerate(tools)],
        "tool_choice": "none" if body.get("tool_choice") == {"type": "none"} else None,
        **{name: body.get(name) for name in ("max_tokens", "temperature", "top_p")},
    }
    return openai_api.read(converted)


def write(answer: ChatAnswer, request: ChatRequest, model: Json) -> dict[str, Json]:
    """An answer."""
    content: list[Json] = [{"type": "text", "text": answer.text}] if answer.text or not answer.calls else []
    content += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments} for call in answer.calls
    ]
    ended = answer.finish_reason is FinishReason.STOP
    return {
        "id": answer.id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": "tool_use" if answer.calls else "end_turn" if ended else "max_tokens",
        "stop_sequence": None,
        "usage": {"input_tokens": answer.num_prompt_tokens, "output_tokens": answer.num_tokens},
    }


def write_error(error: ChatError) -> dict[str, Json]:
    """A refusal."""
    return {"type": "error", "error": {"type": "invalid_request_error", "message": f"{error.code}: {error}"}}


def _messages(item: Json, where: str) -> list[dict[str, Json]]:
    """A message as OpenAI's: results of tools are messages of their own there."""
    if not isinstance(item, dict):
        raise ChatError(f"{where} is not a message (got {type(item).__name__})")
    role, content = item.get("role"), item.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    made: list[dict[str, Json]] = []
    text, calls = "", []
    for n, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(block, dict) or kind not in ("text", "tool_use", "tool_result"):
            raise ChatError(f"{where}.content[{n}] is of type {kind}; text, tool_use and tool_result are read")
        if kind == "text":
            text += str(block.get("text", ""))
        elif kind == "tool_use":
            function: Json = {"name": block.get("name"), "arguments": json.dumps(block.get("input"))}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        else:
            said = _text(block.get("content"), f"{where}.content[{n}]")
            made.append({"role": "tool", "content": said, "tool_call_id": block.get("tool_use_id")})
    if text or calls or not made:
        made.append({"role": role, "content": text, **({"tool_calls": cast(Json, calls)} if calls else {})})
    return made


def _text(content: Json, where: str) -> str:
    """Text, or blocks of text."""
    if content is None or isinstance(content, str):
        return content or ""
    blocks = content if isinstance(content, list) else [content]
    texts = [block.get("text") if isinstance(block, dict) else None for block in blocks]
    if not all(isinstance(text, str) for text in texts):
        raise ChatError(f"{where} holds blocks that are not text")
    return "".join(map(str, texts))


def _tool(tool: Json, where: str) -> Json:
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise ChatError(f"{where} has no name")
    function: dict[str, Json] = {
        "name": tool["name"],
        "description": tool.get("description", ""),
        "parameters": tool.get("input_schema", {}),
    }
    return {"type": "function", "function": function}
