"""OpenAI's chat completions: requests read, answers and errors written.

Source: OpenAI API reference, "Create chat completion".
"""

import json
import time
from collections.abc import Mapping

from rlhf.conversations.messages import MessageError, parse_message, parse_tools
from rlhf.environments.calls import Call
from rlhf.environments.chat import ChatAnswer, ChatError, ChatRequest, Heard, call_key, number, refuse
from rlhf.types import FinishReason, Json

PATH = "chat/completions"
MOST_TOKENS = 2**31
NEUTRAL: Mapping[str, tuple[Json, ...]] = {
    "stream": (False,),
    "n": (1,),
    "stop": ([],),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "functions": ([],),
    "modalities": (["text"],),
}
"""Settings that would change what is sampled or how it is sent, and their values that do not."""


def read(body: Mapping[str, Json]) -> ChatRequest:
    """A request. Raises ChatError."""
    refuse(body, NEUTRAL)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ChatError("messages is not a list of messages")
    try:
        tools = () if body.get("tool_choice") == "none" else parse_tools(body.get("tools"), "tools")
        heard = tuple(_heard(item, f"messages[{n}]") for n, item in enumerate(messages))
    except MessageError as error:
        raise ChatError(str(error)) from error
    limits = [number(body, name, 1, MOST_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    return ChatRequest(
        messages=heard,
        tools=tools,
        max_tokens=next((int(limit) for limit in limits if limit is not None), None),
        temperature=number(body, "temperature", 0.0, 2.0),
        top_p=number(body, "top_p", 1e-6, 1.0),
        with_log_probs=bool(body.get("logprobs")),
    )


def write(answer: ChatAnswer, request: ChatRequest, model: Json) -> dict[str, Json]:
    """An answer."""
    calls: list[Json] = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in answer.calls
    ]
    said: dict[str, Json] = {"role": "assistant", "content": answer.text or (None if calls else "")}
    if calls:
        said["tool_calls"] = calls
    reason = "tool_calls" if calls else "stop" if answer.finish_reason is FinishReason.STOP else "length"
    log_probs: list[Json] = [
        {"token": text, "logprob": log_prob, "bytes": None, "top_logprobs": []} for text, log_prob in answer.log_probs
    ]
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": said,
                "finish_reason": reason,
                "logprobs": {"content": log_probs} if request.with_log_probs else None,
            }
        ],
        "usage": {
            "prompt_tokens": answer.num_prompt_tokens,
            "completion_tokens": answer.num_tokens,
            "total_tokens": answer.num_prompt_tokens + answer.num_tokens,
        },
    }


def write_error(error: ChatError) -> dict[str, Json]:
    """A refusal."""
    return {"error": {"message": str(error), "type": "invalid_request_error", "param": None, "code": error.code}}


def _heard(item: Json, where: str) -> Heard:
    """A message. Raises MessageError."""
    if not isinstance(item, dict):
        raise MessageError(f"{where} is not a message (got {type(item).__name__})")
    calls = item.get("tool_calls") or []
    said = item.get("content") or ""
    if item.get("role") == "assistant" and not calls and isinstance(said, str) and not said.strip():
        return Heard(role="assistant", text=said)  # as the policy may have answered
    message = parse_message(item, where)
    keys = tuple(map(_call_key, calls)) if isinstance(calls, list) else ()
    return Heard(role=message.role, text=message.content, calls=keys, message=message)


def _call_key(call: Json) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return json.dumps(call, sort_keys=True)
    arguments = function.get("arguments")
    try:
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        given = arguments
    if not isinstance(given, dict):
        return json.dumps(function, sort_keys=True)
    return call_key(Call(name=str(function.get("name")), arguments=given))
