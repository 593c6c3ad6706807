"""One episode's access to tools and its environment: what comes back, and what happens when it does not."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rlhf.environments.host import Host, HostLostError, HostOverranError, Hosts
from rlhf.environments.idle import IdleClock
from rlhf.environments.spec import WorldSpec
from rlhf.errors import ConfigError
from rlhf.types import Json

logger = logging.getLogger(__name__)


class EnvironmentFaultError(Exception):
    """An environment raised, took too long or died: its episode cannot go on. Says what and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a call or a turn gave. `failed` says that the call did not do what it should; its text says why."""

    text: str
    reward: float | None = None
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, float] = field(default_factory=dict)
    failed: bool = False


class Session(Protocol):
    """Tools, and an environment that lives from `open` to `close`. Used by one task.

    A function that raises, takes too long or ends its process gives a Reply that says so; one that ended its process is
    called once more, alone in a process of its own: another call may have ended the first one. An environment whose
    process ends or that takes too long raises EnvironmentFaultError, as one that raises in reset, step or reward.
    """

    async def open(self, row: Mapping[str, Json]) -> str | None:
        """Build the environment and reset it with a row. Returns what the user says first, if anything."""
        ...

    async def step(self, text: str) -> Reply:
        """Give the environment a turn's text."""
        ...

    async def reward(self) -> float:
        """The environment's reward at the end."""
        ...

    async def call_method(self, name: str, arguments: Json) -> Reply:
        """Call a method of the environment. One that raises is an observation; its environment goes on."""
        ...

    async def call_function(self, name: str, arguments: Json) -> Reply:
        """Call a tool that is a function."""
        ...

    async def close(self) -> None:
        """Close the environment. That it fails at this has no consequence: it has given all that it can."""
        ...


class Sessions(Protocol):
    """Opens sessions of episodes, in the places that it has for them."""

    def session(self, name: str, *, alone: bool) -> Session:
        """A session. `name` is unique; `alone` gives the environment a process of its own."""
        ...

    async def close(self) -> None:
        """End all processes."""
        ...


class LocalSessions:
    """Implements `Sessions`, by processes on this node."""

    def __init__(self, spec: WorldSpec, *, num_processes: int, timeout_s: float) -> None:
        self._hosts = Hosts(spec, num_processes)
        self._timeout_s = timeout_s

    def session(self, name: str, *, alone: bool) -> "LocalSession":
        return LocalSession(self._hosts, name, timeout_s=self._timeout_s, alone=alone)

    async def start(self) -> None:
        """Start the first process. Raises ConfigError if the user's code cannot be loaded."""
        await self._hosts.shared()

    async def close(self) -> None:
        await self._hosts.close()


class LocalSession:
    """Implements `Session`, by a process of this node."""

    def __init__(self, hosts: Hosts, name: str, *, timeout_s: float, alone: bool) -> None:
        self._hosts = hosts
        self._name = name
        self.timeout_s = timeout_s
        """Longest time for one call; of a loop, without a request."""
        self._alone = alone
        self._host: Host | None = None

    async def close(self) -> None:
        host, self._host = self._host, None
        if host is None:
            return
        try:
            await host.settled(self._name)  # an environment does one thing at a time, and is built before it is closed
            reply = await host.ask({"op": "close", "episode": self._name}, self.timeout_s)
            if failure := reply.get("raised"):
                logger.warning("%s: close(): %s", self._hosts.spec.name, failure)
        except (HostLostError, HostOverranError) as late:
            if not host.is_closed:
                logger.warning("%s: close(): %s", self._hosts.spec.name, late)
        finally:
            host.num_users -= 1
            await self._hosts.give_back(host)
            await self._hosts.close_retired()

    async def open(self, row: Mapping[str, Json]) -> str | None:
        await self._enter()
        reply = await self._ask("reset()", {"op": "open", "row": dict(row)})
        said = reply["observation"]
        return None if said is None else str(said)

    async def step(self, text: str) -> Reply:
        return _reply(await self._ask("step()", {"op": "step", "text": text}))

    async def reward(self) -> float:
        return float(str((await self._ask("reward()", {"op": "reward"}))["reward"]))

    async def call_method(self, name: str, arguments: Json) -> Reply:
        request: dict[str, Json] = {"op": "call", "name": name, "arguments": arguments}
        return _reply(await self._ask(f"{name}()", request, raises=False))

    async def call_function(self, name: str, arguments: Json) -> Reply:
        request: dict[str, Json] = {"op": "call", "episode": self._name, "name": name, "arguments": arguments}
        try:
            try:
                return await self._called(await self._hosts.shared(), request)
            except HostLostError:
                host = await self._hosts.own(for_call=True)
                try:
                    return await self._called(host, request)
                finally:
                    await self._hosts.give_back(host)
        except ConfigError as error:
            return Reply(text=f"error: no process for {name} can start: {' '.join(error.problems)}", failed=True)
        except HostOverranError as error:
            return Reply(text=f"error: {name} {error}", failed=True)
        except HostLostError as error:
            return Reply(text=f"error: the process of {name} {error}", failed=True)

    async def run(self, url: str, row: Mapping[str, Json], clock: IdleClock) -> Reply:
        """Run the user's own loop, which asks for turns at `url`. It has no deadline but that of the clock."""
        host = await self._enter()
        try:
            clock.restart()
            reply = host.begin({"op": "run", "episode": self._name, "url": url, "row": dict(row)})
            while not reply.done():
                if clock.left_s() <= 0:
                    await host.give_up()
                    raise EnvironmentFaultError(f"run() asked for nothing and did not end for {clock.timeout_s:g} s")
                await asyncio.wait({reply}, timeout=clock.left_s())
            answer = reply.result()
        except HostLostError as error:
            raise EnvironmentFaultError(f"run(): its process {error}") from error
        if "raised" in answer:
            raise EnvironmentFaultError(f"run() raised {answer['raised']}")
        return _reply(answer)

    async def _enter(self) -> Host:
        """Take the process in which the episode lives, until `close`."""
        try:
            host = await (self._hosts.own(for_call=False) if self._alone else self._hosts.shared())
        except ConfigError as error:
            raise EnvironmentFaultError(str(error)) from error
        host.num_users += 1
        self._host = host
        return host

    async def _called(self, host: Host, request: Mapping[str, Json]) -> Reply:
        host.num_users += 1
        try:
            return _reply(await host.ask(request, self.timeout_s))
        finally:
            host.num_users -= 1

    async def _ask(self, what: str, request: Mapping[str, Json], *, raises: bool = True) -> dict[str, Json]:
        """Ask the environment. Raises EnvironmentFaultError; with `raises`, also where its code raised."""
        assert self._host is not None, "opened"
        try:
            reply = await self._host.ask({**request, "episode": self._name}, self.timeout_s)
        except (HostLostError, HostOverranError) as error:
            died = "its process " if isinstance(error, HostLostError) else ""
            raise EnvironmentFaultError(f"{what}: {died}{error}") from error
        if raises and "raised" in reply:
            raise EnvironmentFaultError(f"{what} raised {reply['raised']}")
        return reply


def _reply(reply: Mapping[str, Json]) -> Reply:
    for key in ("raised", "wrong"):
        if key in reply:
            return Reply(text=f"error: {reply[key]}", failed=True)
    info, reward = reply["info"], reply["reward"]
    assert isinstance(info, dict), "the process sends an object"
    return Reply(
        text=str(reply["text"]),
        reward=None if reward is None else float(str(reward)),
        terminated=bool(reply["terminated"]),
        truncated=bool(reply["truncated"]),
        info={name: float(str(value)) for name, value in info.items()},
    )
