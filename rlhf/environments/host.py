"""Processes that run tools and environments, seen from the process that asks them. All on one event loop."""

import asyncio
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from rlhf.engines.process.child_process import ending, kill, log_lines
from rlhf.engines.process.user_code import TOO_MANY_PROCESSES
from rlhf.environments.spec import Described, WorldSpec, read_described
from rlhf.environments.world import CONCURRENCY
from rlhf.errors import ConfigError
from rlhf.types import Json

START_TIMEOUT_S = 120.0
PING_TIMEOUT_S = 5.0
MAX_LATE = CONCURRENCY // 2
MAX_OWN = max(4, os.cpu_count() or 1)
"""Processes for episodes that begin anew, and as many for calls that are made again, at a time: when one ends that
hundreds shared, not each of them can have one."""
MAX_REPLY_BYTES = 64 * 2**20
LENGTH = struct.Struct("!i")
"""What `multiprocessing.connection.Connection` writes before each message."""


class HostLostError(Exception):
    """The process died, or none of its threads runs any more. Says which."""


class HostOverranError(Exception):
    """A request took too long; others in the same process go on."""


class Host:
    """One process with the user's code. `start` opens one.

    One task reads replies.
        consumes: replies, in any order. Produces: the ends of futures. Waits for: the next reply. Unblocked by: the
        process's end. Each request has a deadline of its own, which begins when one of the process's threads is free.
    A request that passes its deadline keeps its thread. If the process still answers others it goes on with what it
    has, but is `retired`: nothing new should be asked of it. If not, it is killed, and all requests end.
    """

    described: Described

    def __init__(self, process: "subprocess.Popen[bytes]", spec: WorldSpec) -> None:
        self.num_users = 0
        """Episodes that live in it, and calls under way for others."""
        self.retired = False
        self.is_closed = False
        self._process = process
        self._spec = spec
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Json]]] = {}
        self._calls: dict[asyncio.Future[dict[str, Json]], str] = {}
        """Those that have a place in `_free` and a deadline, by their episodes."""
        self._free = asyncio.Semaphore(CONCURRENCY)
        self._late: set[int] = set()
        """Requests that passed their deadlines, whose threads are not free yet."""
        self._lost = ""
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, spec: WorldSpec) -> "Host":
        """Start a process and load the user's code in it. Raises ConfigError with everything that is wrong with it."""
        ours, theirs = socket.socketpair()
        path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100 an empty entry means this folder
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlhf.environments.child", str(theirs.fileno()), str(spec.max_processes)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={**os.environ, **_direct(os.environ), "PYTHONPATH": os.pathsep.join(path)},
        )
        theirs.close()
        assert process.stdout is not None, "stdout is a pipe"
        threading.Thread(target=log_lines, args=(process.stdout, spec.name), daemon=True).start()
        host = cls(process, spec)
        host._reader, host._writer = await asyncio.open_connection(sock=ours)
        try:
            await asyncio.wait_for(host._load(path), START_TIMEOUT_S)
        except (TimeoutError, OSError, EOFError) as error:
            late = isinstance(error, TimeoutError)
            await host.close()
            text = f"took over {START_TIMEOUT_S:g} s" if late else host._ended()
            raise ConfigError(f"rollout: importing {spec.name} {text}.") from error
        except BaseException:  # it was refused, or nobody waits for it any more
            await host.close()
            raise
        host._task = asyncio.create_task(host._read())
        return host

    @property
    def is_usable(self) -> bool:
        """Whether more may be asked of it."""
        return not self.retired and not self._lost

    async def ask(self, request: Mapping[str, Json], timeout_s: float) -> dict[str, Json]:
        """Send a request of an episode and wait for its reply. Raises HostLostError or HostOverranError. One that was
        sent meets its deadline also where nobody waits for it any more."""
        await self._free.acquire()
        call = asyncio.ensure_future(self._asked(request, timeout_s))
        self._calls[call] = str(request["episode"])
        call.add_done_callback(self._calls.pop)
        return await asyncio.shield(call)

    async def settled(self, episode: str) -> None:
        """Wait for the calls of an episode, also those that nobody else waits for any more. Each has its deadline."""
        if calls := [call for call, name in self._calls.items() if name == episode]:
            await asyncio.wait(calls)

    async def _asked(self, request: Mapping[str, Json], timeout_s: float) -> dict[str, Json]:
        """As `ask`, for one of the places in `_free`."""
        if self._lost:
            self._free.release()
            raise HostLostError(self._lost)
        number = next(self._ids)
        reply = self._waiting[number] = asyncio.get_running_loop().create_future()
        reply.add_done_callback(lambda _: self._free.release())
        self._send({"id": number, **request})
        try:
            return await asyncio.wait_for(asyncio.shield(reply), timeout_s)
        except TimeoutError as error:
            self.retired = True
            self._late.add(number)
            reply.add_done_callback(lambda _: self._late.discard(number))
            await self._require_answers()
            raise HostOverranError(f"took over {timeout_s:g} s") from error

    def begin(self, request: Mapping[str, Json]) -> "asyncio.Future[dict[str, Json]]":
        """Send a request that takes as long as it likes and keeps no thread. It and the future raise HostLostError."""
        if self._lost:
            raise HostLostError(self._lost)
        number = next(self._ids)
        reply = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send({"id": number, **request})
        return reply

    async def give_up(self) -> None:
        """Nobody waits for something in it any more: it should be asked nothing new. Raises HostLostError if it does
        not even say that it is there."""
        self.retired = True
        await self._require_answers()

    async def close(self) -> None:
        """Kill the process with everything that it started."""
        self.retired = self.is_closed = True
        if self._task is not None:
            self._task.cancel()
        self._lose("was closed")
        self._writer.close()
        await asyncio.get_running_loop().run_in_executor(None, partial(_end, self._process))

    async def _require_answers(self) -> None:
        """Give the process up if it does not even say that it is there, because one call keeps all its threads from
        running: raises HostLostError. Or if late calls have so many threads that others might wait for ever."""
        if len(self._late) > MAX_LATE:
            self._lose(f"has {len(self._late)} calls that do not end")
            return
        number = next(self._ids)
        pong = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send({"id": number, "op": "ping"})
        await asyncio.wait([pong], timeout=PING_TIMEOUT_S)
        if pong.done():
            pong.result()
            return
        self._lose("answered none of its calls any more")
        raise HostLostError(self._lost)

    async def _load(self, path: list[str]) -> None:
        setup: dict[str, Json] = {
            "tools": list(self._spec.tools),
            "environments": list(self._spec.environments),
            "agent": self._spec.agent,
            "memory_bytes": None if self._spec.memory_gib is None else int(self._spec.memory_gib * 2**30),
            "path": list(path),
            "network": self._spec.network,
        }
        self._send(setup)
        hello = await self._receive()
        if isinstance(problems := hello.get("problems"), list):
            raise ConfigError([str(problem) for problem in problems])
        self.described = read_described(hello)

    def _send(self, message: Mapping[str, Json]) -> None:
        """Does not wait until the process has read it: one that is stopped never does, and replies have deadlines."""
        content = json.dumps(message).encode()
        # The reader learns that the process is gone. uvloop, in workers, raises RuntimeError for a closed transport.
        with suppress(OSError, RuntimeError):
            self._writer.write(LENGTH.pack(len(content)) + content)

    async def _receive(self) -> dict[str, Json]:
        (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        if not 0 <= size <= MAX_REPLY_BYTES:
            raise EOFError(f"a reply of {size} bytes")
        reply: dict[str, Json] = json.loads(await self._reader.readexactly(size))
        return reply

    async def _read(self) -> None:
        try:
            while True:
                reply = await self._receive()
                waiting = self._waiting.pop(int(str(reply["id"])), None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(reply)
        except (OSError, EOFError, ValueError):
            ended = await asyncio.get_running_loop().run_in_executor(None, self._ended)
            self._lose(ended)

    def _ended(self) -> str:
        """How the process ended."""
        too_many = f"was ended, because more than {self._spec.max_processes} processes were started from it"
        return ending(self._process, {TOO_MANY_PROCESSES: too_many})

    def _lose(self, why: str) -> None:
        self._lost = self._lost or why
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(HostLostError(self._lost))
                future.exception()  # who asked may be gone


def _direct(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables with which clients in a user's own loop reach the endpoint on this machine by no proxy."""
    given = dict.fromkeys(variables[name] for name in ("no_proxy", "NO_PROXY") if variables.get(name))
    return {} if "*" in given else dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join([*given, "127.0.0.1"]))


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        kill(process)
    process.wait()


class Hosts:
    """The processes of a run: `num_shared` that episodes share, and others of their own for what is tried again.
    They are started when they are needed."""

    def __init__(self, spec: WorldSpec, num_shared: int) -> None:
        self.spec = spec
        self._num_shared = num_shared
        self._shared: list[Host] = []
        self._retired: list[Host] = []
        self._own: dict[Host, asyncio.Semaphore] = {}
        """Each with the places of its kind."""
        # Apart: an episode that keeps a place may have to wait for one for a call, and calls end.
        self._places = {for_call: asyncio.Semaphore(MAX_OWN) for for_call in (False, True)}
        self._starting = asyncio.Lock()

    async def shared(self) -> Host:
        """The process with the fewest users."""
        async with self._starting:
            for host in [host for host in self._shared if not host.is_usable]:
                self._shared.remove(host)
                self._retired.append(host)
            await self.close_retired()
            if len(self._shared) < self._num_shared:
                self._shared.append(await Host.start(self.spec))
            return min(self._shared, key=lambda host: host.num_users)

    async def own(self, *, for_call: bool) -> Host:
        """A process that nobody else uses, for one call or for a whole episode, once there is a place for one.
        `give_back` ends it."""
        places = self._places[for_call]
        await places.acquire()
        try:
            host = await Host.start(self.spec)
        except BaseException:
            places.release()
            raise
        self._own[host] = places
        return host

    async def give_back(self, host: Host) -> None:
        """End a process of one's own."""
        if (places := self._own.pop(host, None)) is not None:
            places.release()
            await host.close()

    async def close_retired(self) -> None:
        """End processes that nobody uses any more."""
        for host in [host for host in self._retired if host.num_users == 0]:
            self._retired.remove(host)
            await host.close()

    async def close(self) -> None:
        hosts = [*self._shared, *self._retired, *self._own]
        self._shared, self._retired, self._own = [], [], {}
        await asyncio.gather(*(host.close() for host in hosts))


def describe(spec: WorldSpec) -> Described:
    """Load tools and environment in a process of their own and say what they are. Raises ConfigError with everything
    that is wrong with them."""

    async def load() -> Described:
        host = await Host.start(spec)
        await host.close()
        return host.described

    return asyncio.run(load())


def try_reset(spec: WorldSpec, row: Mapping[str, Json], timeout_s: float) -> str:
    """Build an environment and reset it with a row, in a process of its own. Returns what went wrong, or nothing."""

    async def reset() -> str:
        host = await Host.start(spec)
        try:
            reply = await host.ask({"op": "open", "episode": "trial", "row": dict(row)}, timeout_s)
            return f"raised {reply['raised']}" if "raised" in reply else ""
        except (HostLostError, HostOverranError) as error:
            return str(error)
        finally:
            await host.close()

    return asyncio.run(reset())
