"""The process that runs tools and environments; started by `HostProcess` with `python -m`.

Exchanges JSON over the socket whose file descriptor is the first argument: one setup, one hello, then a reply to each
request, in the order in which they end.
"""

import asyncio
import json
import os
import resource
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from rlhf.engines.process.user_code import exit_with_parent, leave_network, reply, run
from rlhf.environments.world import LoadError, World


def serve(connection: Connection) -> None:
    """Load the user's code, then answer requests until the parent closes the socket or this process's parent ends."""
    os.set_inheritable(connection.fileno(), False)
    try:
        setup = json.loads(connection.recv_bytes())
        if not setup["network"] and (why := leave_network()):
            raise LoadError([f"rollout.environment_network: false is not possible here ({why})."])
        threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
        sys.path[:] = list(dict.fromkeys([str(Path.cwd()), *setup["path"]]))
        if setup["memory_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (setup["memory_bytes"],) * 2)
        world = World.load(setup["tools"], setup["environments"], setup["agent"])
    except LoadError as error:
        reply(connection, {"problems": error.problems})
        return
    except EOFError:
        return
    reply(connection, world.described())
    asyncio.run(answer_all(world, connection))


async def answer_all(world: World, connection: Connection) -> None:
    """Answer requests as they come, many at the same time."""
    loop = asyncio.get_running_loop()
    under_way: set[asyncio.Task[None]] = set()

    async def answer(request: Mapping[str, object]) -> None:
        reply(connection, {"id": request["id"], **await world.answer(request)})

    def begin(request: Mapping[str, object]) -> None:
        task = loop.create_task(answer(request))
        under_way.add(task)
        task.add_done_callback(under_way.discard)

    def read() -> None:
        try:
            while True:
                loop.call_soon_threadsafe(begin, json.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)  # the user's threads may never end

    threading.Thread(target=read, daemon=True).start()
    await loop.create_future()


if __name__ == "__main__":
    run(serve)
