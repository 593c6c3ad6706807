"""A conversation as a harness of verifiers: the model's turns and calls of tools, in this process.

Those of verifiers that talk are programs, installed for each episode, and stream.
"""

import json
from contextlib import AsyncExitStack
from typing import Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

from rlhf.types import Json

__all__ = ["ConversationHarness"]

LIMITS = ("context_length_exceeded", "max_turns")
"""Codes with which the endpoint refuses a turn that an episode has no room for: it is over, and no failure."""


class ConversationHarness(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]
    """Asks for turns until one has no calls."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any
    ) -> Any:
        """One conversation, to its end."""
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            schemas, dispatch, connections = await connect_mcp({"mcpServers": servers}, stack)
            client = httpx.AsyncClient(
                base_url=endpoint,
                headers={"Authorization": f"Bearer {secret}"},
                timeout=None,
                trust_env=False,
                verify=False,  # on this machine, without TLS: saves reading certificates
            )
            await stack.enter_async_context(client)
            messages = messages_of(*self.resolve_prompt(data))
            body: dict[str, Any] = {"model": ctx.model, "messages": messages} | ({"tools": schemas} if schemas else {})
            while True:
                reply = await client.post("chat/completions", json=body)
                if reply.status_code != httpx.codes.OK:
                    is_over = trace.num_turns > 0 and any(code in reply.text for code in LIMITS)
                    return vf.ProgramResult(0 if is_over else 1, "", reply.text)
                said = reply.json()["choices"][0]["message"]
                messages.append(said)
                if not said.get("tool_calls"):
                    return vf.ProgramResult(0, "", "")
                for call in said["tool_calls"]:
                    content = await _called(call["function"], dispatch, connections)
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})


def messages_of(system: str | None, prompt: Any) -> list[Json]:
    """A task's prompt, text or messages, as a request has it."""
    messages: list[Json] = [{"role": "system", "content": system}] if system else []
    if isinstance(prompt, str):
        return [*messages, {"role": "user", "content": prompt}]
    return [*messages, *(message_to_wire(message) for message in prompt or ())]


async def _called(function: dict[str, str], dispatch: dict[str, Any], connections: dict[str, Any]) -> Any:
    """What a call gives, or why it gives nothing."""
    if function["name"] not in dispatch:
        return f"error: no tool {function['name']}; have {', '.join(dispatch) or 'none'}"
    try:
        return await call_mcp(connections, dispatch, function["name"], json.loads(function["arguments"]))
    except Exception as error:  # of the server, or on the way to it
        return f"error: {type(error).__name__}: {error}"
