"""Loops as users write them."""

import asyncio
import contextlib
import json
import os
from pathlib import Path

import httpx

from rlhf.environments.agent import AgentSession
from rlhf.environments.environment import Result
from rlhf.types import Json

ADD: dict[str, object] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
Row = dict[str, Json]


def add(arguments: str) -> str:
    given = json.loads(arguments)
    return str(given["a"] + given["b"])


async def calculates(session: AgentSession, row: Row) -> float:
    """Until the policy calls nothing any more."""
    import openai  # noqa: PLC0415  slow

    client = openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
    messages = list(row["messages"])  # type: ignore[arg-type]
    while True:
        reply = await client.chat.completions.create(model=session.model, messages=messages, tools=[ADD])  # type: ignore[arg-type,list-item]
        said = reply.choices[0].message
        messages.append(said.model_dump())
        if not said.tool_calls:
            return float(said.content == "It is 5.")
        for call in said.tool_calls:
            content = add(call.function.arguments)  # type: ignore[union-attr]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


async def calculates_with_anthropic(session: AgentSession, row: Row) -> float:
    import anthropic  # noqa: PLC0415  slow

    client = anthropic.AsyncAnthropic(base_url=session.base_url, api_key=session.api_key)
    tool = {"name": "add", "description": "Add two numbers.", "input_schema": ADD["function"]["parameters"]}  # type: ignore[index]
    messages = list(row["messages"])  # type: ignore[arg-type]
    while True:
        reply = await client.messages.create(model=session.model, max_tokens=100, messages=messages, tools=[tool])  # type: ignore[arg-type,list-item]
        messages.append({"role": "assistant", "content": [block.model_dump() for block in reply.content]})
        calls = [block for block in reply.content if block.type == "tool_use"]
        if not calls:
            return float(reply.content[0].text == "It is 5.")  # type: ignore[union-attr]
        results: list[Json] = [
            {"type": "tool_result", "tool_use_id": call.id, "content": add(json.dumps(call.input))} for call in calls
        ]
        messages.append({"role": "user", "content": results})


async def repeats_what_it_heard(session: AgentSession, row: Row) -> float:
    import openai  # noqa: PLC0415  slow

    client = openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
    messages = list(row["messages"])  # type: ignore[arg-type]
    for _ in range(2):
        reply = await client.chat.completions.create(model=session.model, messages=messages, tools=[ADD])  # type: ignore[arg-type,list-item]
        messages += [reply.choices[0].message.model_dump(), {"role": "user", "content": "on"}]
    return 1.0


async def ask(session: AgentSession, *messages: str, **settings: Json) -> dict[str, Json]:
    """Without any client of an API's."""
    roles = ("user", "assistant")
    body = {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(messages)], **settings}
    async with httpx.AsyncClient(timeout=20) as client:
        reply = await client.post(f"{session.base_url}/chat/completions", json=body)
        found: dict[str, Json] = reply.json()
        return found


def text_of(reply: dict[str, Json]) -> str:
    return str(reply["choices"][0]["message"]["content"])  # type: ignore[index,call-overload]


async def edits_its_history(session: AgentSession, row: Row) -> float:
    first = text_of(await ask(session, "Go."))
    second = text_of(await ask(session, "Go.", first, "on"))
    text_of(await ask(session, "Go.", "something else", "on"))
    text_of(await ask(session, "Go.", first, "on", second, "and on"))
    return 1.0


async def asks_two_at_once(session: AgentSession, row: Row) -> float:
    first, second = await asyncio.gather(ask(session, "Go."), ask(session, "Go."))
    await ask(session, "Go.", text_of(first), "left")
    await ask(session, "Go.", text_of(second), "right")
    return 1.0


async def asks_a_sub_agent(session: AgentSession, row: Row) -> float:
    plan = text_of(await ask(session, "Go."))
    found = text_of(await ask(session, "Find out."))
    await ask(session, "Go.", plan, found)
    return 1.0


async def cools_down(session: AgentSession, row: Row) -> Result:
    first = text_of(await ask(session, "Go.", temperature=0.0, max_tokens=50))
    reply = await ask(session, "Go.", first, "on", temperature=1.0, logprobs=True)
    probabilities = reply["choices"][0]["logprobs"]["content"]  # type: ignore[index,call-overload]
    assert [one["logprob"] for one in probabilities] == [-0.5] * len(probabilities)  # type: ignore[union-attr,index,call-overload,arg-type]
    return Result(reward=0.5, info={"asked": 2}, terminated=True)


async def never_stops(session: AgentSession, row: Row) -> float:
    while True:
        await asyncio.sleep(0)
        reply = await ask(session, "Go.")
        if "error" in reply:
            raise RuntimeError(str(reply["error"]))


async def asks_on_where_it_is_refused(session: AgentSession, row: Row) -> float:
    body = {"messages": [{"role": "user", "content": "Go."}]}
    async with httpx.AsyncClient(timeout=20) as client:
        while True:
            await client.post(f"{session.base_url}/chat/completions", json=body)
            await asyncio.sleep(0.1)


async def catches_the_limit(session: AgentSession, row: Row) -> float:
    said = ["Go."]
    while True:
        reply = await ask(session, *said)
        if "error" in reply:
            return 0.25
        said += [text_of(reply), "on"]


async def hears_special_tokens(session: AgentSession, row: Row) -> float:
    said = ["Go.", text_of(await ask(session, "Go.")), "a<|im_end|>b"]
    said += [text_of(await ask(session, *said)), "on"]
    await ask(session, *said)
    return 1.0


async def begins_anew_where_it_is_refused(session: AgentSession, row: Row) -> float:
    reply = await ask(session, "word " * 500)
    assert reply["error"]["code"] == "context_length_exceeded"  # type: ignore[index,call-overload]
    await ask(session, "Go.")
    return 1.0


async def returns_what_its_row_says(session: AgentSession, row: Row) -> object:
    await ask(session, "Go.")
    returned: dict[str, object] = {
        "five values": ("", 0.5, True, False, {"a": 1}),
        "text": "1.0",
        "nan": float("nan"),
        "two values": (1.0, {"x": 1}),
        "five others": (1, 2, 3, 4, 5),
        "a Result of text": Result(reward="1.0"),  # type: ignore[arg-type]
    }
    return returned[str(row["returns"])]


async def fails(session: AgentSession, row: Row) -> float:
    raise ValueError("no way")


async def calls_and_thinks(session: AgentSession, row: Row) -> float:
    await ask(session, "Go.", tools=[ADD])  # type: ignore[list-item]
    await asyncio.sleep(1.0)
    return 1.0


async def asks_twice_and_again(session: AgentSession, row: Row) -> float:
    """Two clients ask for the same. One waits; the other hangs up, and asks again as stock clients do."""
    body = {"messages": [{"role": "user", "content": "Go."}]}
    url = f"{session.base_url}/chat/completions"
    async with httpx.AsyncClient(timeout=60) as client:
        first = asyncio.ensure_future(client.post(url, json=body))
        await asyncio.sleep(0.3)
        with contextlib.suppress(httpx.ReadTimeout):
            await client.post(url, json=body, timeout=1.0)
        second = client.post(url, json=body, headers={"x-stainless-retry-count": "1"})
        return float(text_of((await second).json()) != text_of((await first).json()))


async def leaves(session: AgentSession, row: Row) -> float:
    raise SystemExit("no way")


async def sleeps(session: AgentSession, row: Row) -> float:
    await ask(session, "Go.")
    await asyncio.sleep(60)
    return 1.0


async def blocks(session: AgentSession, row: Row) -> float:
    """Keeps the whole process from doing anything else."""
    import time  # noqa: PLC0415

    time.sleep(60)
    return 1.0


async def dies(session: AgentSession, row: Row) -> float:
    os._exit(3)


async def says_nothing_of_it(session: AgentSession, row: Row) -> None:
    await ask(session, "Go.")


async def tries_again(session: AgentSession, row: Row) -> float:
    """Hangs up before its answer is there, and asks again."""
    body = {"messages": [{"role": "user", "content": "Go."}]}
    async with httpx.AsyncClient() as client:
        for timeout in (1.0, 20.0):
            try:
                reply = await client.post(f"{session.base_url}/chat/completions", json=body, timeout=timeout)
            except httpx.ReadTimeout:
                continue
        await ask(session, "Go.", text_of(reply.json()), "on")
    return 1.0


async def leaves_its_number(session: AgentSession, row: Row) -> float:
    """Two turns, without a client that asks again."""
    Path(str(row["note"])).write_text(str(os.getpid()))
    first = text_of(await ask(session, "Go."))
    await ask(session, "Go.", first, "on")
    return 1.0


async def has_a_client_that_asks_again(session: AgentSession, row: Row) -> float:
    import openai  # noqa: PLC0415  slow

    client = openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
    messages: list[dict[str, object]] = [{"role": "user", "content": "Go."}]
    for said in ("on", "and on"):
        reply = await client.chat.completions.create(model=session.model, messages=messages)  # type: ignore[arg-type]
        messages += [reply.choices[0].message.model_dump(), {"role": "user", "content": said}]
    Path(str(row["note"])).write_text(str(os.getpid()))
    return 1.0


async def leaves_a_request_unanswered(session: AgentSession, row: Row) -> float:
    """Returns, or fails where it is told to, while a request of its own is under way."""
    slow = asyncio.create_task(ask(session, "Take your time.", max_tokens=20))
    await asyncio.sleep(0.5)
    said = text_of(await ask(session, "Go.", max_tokens=20))
    assert not slow.done()
    if said == "fail":
        raise ValueError("as told")
    return 1.0


def is_sync(session: AgentSession, row: Row) -> float:
    return 1.0


async def takes_one(session: AgentSession) -> float:
    return 1.0
