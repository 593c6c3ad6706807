"""Runs a user's reward function, as a script that FunctionProcess starts. `environments/child.py` uses it as a module.

Imports only the standard library, so that it starts quickly and cannot shadow the user's modules. Exchanges JSON over
the socket whose file descriptor is the first argument: one setup, one hello, then a reply to each request.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import fcntl
import importlib
import inspect
import json
import operator
import os
import resource
import signal
import socket
import struct
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import SupportsFloat

KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "place",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "both",
    inspect.Parameter.KEYWORD_ONLY: "name",
    inspect.Parameter.VAR_POSITIONAL: "rest",
    inspect.Parameter.VAR_KEYWORD: "columns",
}
LISTS_OF_SCORES = ("rewards", "scores", "score", "reward")
NAMES_OF_SCORE = ("score", "reward")
ONE_AT_A_TIME = " (to get one response at a time, name the parameters prompt, response and label)"
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP, IFREQ = 0x8914, 1, struct.Struct("16sh14x")
POLL_S = 0.5
TOO_MANY_PROCESSES = 86
"""Exit code of a process that was ended because too many others were started from it."""
RUNNER = asyncio.Runner()


def run(serve: Callable[[Connection], None]) -> None:
    """Run `serve`, which gets the socket, in a worker process, and end with it everything that it started. A second
    argument of this program is the greatest number of processes that may descend from the worker."""
    parent = os.getppid()
    # Processes whose own parent ended, or that left the group, become children of this process and can be found.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    worker = os.fork()
    if worker:
        os.close(int(sys.argv[1]))
        end_like(supervise(worker, parent, int(sys.argv[2]) if len(sys.argv) > 2 else None))
    os.setsid()  # a group that can be killed at once, without this process's parent
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    serve(Connection(int(sys.argv[1])))


def supervise(worker: int, parent: int, most: int | None) -> int:
    """Wait until the worker or the parent ends, or for SIGTERM, or until more than `most` processes descend from the
    worker; then kill every descendant.

    Returns the worker's status, 0 if it did not end by itself, that of exit code TOO_MANY_PROCESSES for too many.
    """
    awaited_signals = {signal.SIGCHLD, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited_signals)
    found = None
    while found is None and os.getppid() == parent:
        found = reaped(worker)
        if found is None and most is not None and any(islice(descendants(os.getpid()), most + 1, None)):
            found = TOO_MANY_PROCESSES << 8
        if found is None:
            arrived = signal.sigtimedwait(awaited_signals, POLL_S)
            if arrived is not None and arrived.si_signo == signal.SIGTERM:
                break
    # At once: who forks while processes are killed one by one may stay ahead.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)
    while pids := list(descendants(os.getpid())):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reaped(worker)
        time.sleep(0.01)
    return found or 0


def reaped(worker: int) -> int | None:
    """Reap every child that has ended. Returns the worker's status if it is one of them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                found = ended[1]
    return found


def descendants(pid: int) -> Iterator[int]:
    """The processes below `pid`."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return
    yield from children
    for child in children:
        yield from descendants(child)


def end_like(status: int) -> None:
    """End this process as the worker ended."""
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {os.WTERMSIG(status)})
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def serve(connection: Connection) -> None:
    """Answer requests until the parent closes the socket or this process's parent ends."""
    os.set_inheritable(connection.fileno(), False)
    try:
        setup = json.loads(connection.recv_bytes())
        if not setup["network"] and (why := leave_network()):
            reply(connection, {"wrong": f"network: false is not possible here ({why})"})
            return
        threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
        sys.path[:] = list(dict.fromkeys([str(Path.cwd()), *setup["path"]]))
        if setup["memory_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (setup["memory_bytes"],) * 2)
        function, hello = load(setup["function"])
        reply(connection, hello)
        while function is not None:
            reply(connection, answer(function, json.loads(connection.recv_bytes())))
    except (EOFError, ConnectionError):
        return


def leave_network() -> str:
    """Move this process, which must not have begun threads, to a network of its own in which there is nobody else.
    Needs no privileges. Returns why that is not possible, if so."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET):
        why = os.strerror(ctypes.get_errno())
        return f"unshare: {why}; allow user namespaces, by sysctl or in the container's seccomp profile"
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # what talks to itself may go on
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, IFREQ.pack(b"lo", IFF_UP))
    return ""


def exit_with_parent(parent: int) -> None:
    """End this process once its parent has ended, for whatever reason."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def reply(connection: Connection, message: Mapping[str, object]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(json.dumps(message).encode())


def load(name: str) -> tuple[Callable[..., object] | None, dict[str, object]]:
    """The function `module:name`, and a hello: its parameters, or what is wrong with it."""
    module, _, path = name.partition(":")
    try:
        found: object = importlib.import_module(module)
    except BaseException as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0])
        return None, {"wrong": f"no module {module} in {Path.cwd()}" if missing else f"{module}: {describe(error)}"}
    try:
        found = operator.attrgetter(path)(found)
    except AttributeError:
        return None, {"wrong": f"{module} has no {path}"}
    if inspect.isclass(found):
        return made(found, name)
    if not callable(found) or inspect.isasyncgenfunction(found):
        return None, {"wrong": f"{name} is {a_type(found)}, not a function"}
    return inspected(found, name)


def made(found: type, name: str) -> tuple[Callable[..., object] | None, dict[str, object]]:
    """An object of a class whose objects can be called."""
    if not any("__call__" in vars(base) for base in found.__mro__[:-1]):
        return None, {"wrong": f"{name} is a class without __call__, not a function"}
    try:
        function = found()
    except Exception as error:
        why = f"{name} is a class that cannot be created without arguments ({describe(error)})"
        return None, {"wrong": f"{why}; name an object of it, as scorer = {found.__name__}(...)"}
    return inspected(function, name)


def inspected(function: Callable[..., object], name: str) -> tuple[Callable[..., object] | None, dict[str, object]]:
    """The function and its parameters: name, kind, whether it is required, annotation."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        wrong = f"the parameters of {name} cannot be known; wrap it in def score(prompts, responses, labels, **columns)"
        return None, {"wrong": wrong}
    return function, {
        "parameters": [
            {
                "name": parameter.name,
                "kind": KINDS[parameter.kind],
                "required": parameter.default is parameter.empty,
                "annotation": annotation_of(parameter),
            }
            for parameter in signature.parameters.values()
        ]
    }


def annotation_of(parameter: inspect.Parameter) -> str:
    if parameter.annotation is parameter.empty:
        return ""
    return inspect.formatannotation(parameter.annotation).strip("'\"")


def answer(function: Callable[..., object], request: dict[str, object]) -> dict[str, object]:
    """Call the function on one request: with lists, or once for each response with `each`. Numbers are returned as they
    are, None as null, anything else as text that describes it."""
    placed, named, each, count = (request[key] for key in ("placed", "named", "each", "count"))
    assert isinstance(placed, list), "the parent sends a list"
    assert isinstance(named, dict), "the parent sends an object"
    assert isinstance(count, int), "the parent sends a number"
    given = {**{f"argument {n + 1}": values for n, values in enumerate(placed)}, **named}
    before = {key: list(values) for key, values in given.items()}
    taken_logs()  # of a call that failed
    try:
        if each:
            calls = [
                function(*(values[n] for values in placed), **{key: values[n] for key, values in named.items()})
                for n in range(count)
            ]
            return scored(awaited(calls), count) | {"logged": taken_logs()}
        reply = scored(awaited([function(*placed, **named)])[0], count)
        if changed := rearranged(before, given):
            return {"wrong": changed}
        return reply | {"logged": taken_logs()}
    except BaseException as error:
        return {"raised": describe(error)}


def taken_logs() -> object:
    """What the function reported by `rlhf.log` since the last time; nothing if it never imported it."""
    module = sys.modules.get("rlhf.reward_log")
    return {} if module is None else vars(module)["take"]()


def awaited(results: list[object]) -> list[object]:
    """The results; those of async functions are awaited at the same time, always in the same event loop."""
    if not any(inspect.isawaitable(result) for result in results):
        return results

    async def gather() -> list[object]:
        async def one(result: object) -> object:
            return await result if inspect.isawaitable(result) else result

        return await asyncio.gather(*map(one, results))

    return RUNNER.run(gather())


def rearranged(before: Mapping[str, list[object]], after: Mapping[str, list[object]]) -> str:
    """How a function changed the length or order of a list that it was given: the scores may then belong to other
    responses. Empty if it did not; an entry that was replaced keeps its place."""
    for name, old in before.items():
        new = after[name]
        if len(old) != len(new):
            return f"the function changed the list {name} from {len(old)} to {len(new)} entries; let it copy the list"
        if [*map(id, old)] != [*map(id, new)] and sorted(map(id, old)) == sorted(map(id, new)):
            return f"the function changed the order of the list {name}; let it copy the list"
    return ""


def scored(result: object, count: int) -> dict[str, object]:
    """A reply with the scores of a result, and its named parts: numbers by name, one for each response.

    A result is a list of scores, one list of a mapping (`rewards` or `scores`, the other lists being parts), or a pair
    of scores and parts.
    """
    parts: dict[str, list[float | str | None]] = {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping) and is_list(result[0]):
        result, named = result
        parts = listed(named, count)
    if isinstance(result, Mapping) and (key := next((key for key in LISTS_OF_SCORES if key in result), None)):
        parts = listed({name: values for name, values in result.items() if name != key}, count)
        result = result[key]
    if not is_list(result):
        return {"wrong": f"the function returned {named_type(result)}, need a list of {count} numbers{ONE_AT_A_TIME}"}
    assert isinstance(result, Iterable), "is_list said so"
    scores: list[float | str | None] = []
    for index, item in enumerate(islice(result, count + 1)):
        score, named = divided(item)
        scores.append(score)
        for name, value in named.items():
            parts.setdefault(name, [None] * count)[index : index + 1] = [value]
    return {"scores": scores, "parts": {name: values[:count] for name, values in parts.items()}}


def is_list(value: object) -> bool:
    """Whether a value has one entry for each response, in order. A set has no order; a mapping's is not that of the
    responses."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Set) and not is_record(value)


def is_record(value: object) -> bool:
    """Whether a value is a named tuple or an object of a data class."""
    return dataclasses.is_dataclass(value) or (isinstance(value, tuple) and "_fields" in vars(type(value)))


def listed(named: Mapping[object, object], count: int) -> dict[str, list[float | str | None]]:
    """The parts of all responses at once: a list of numbers by name, or one number for all; mappings are opened."""
    found: dict[str, list[float | str | None]] = {}
    for name, values in named.items():
        if isinstance(values, Mapping):
            found |= listed(values, count)
        elif isinstance(number := plain(values), float):
            found[str(name)] = [number] * count
        elif is_list(values) and isinstance(values, Iterable):
            numbers = [plain(value) for value in islice(values, count + 1)]
            if len(numbers) == count and all(value is None or isinstance(value, float) for value in numbers):
                found[str(name)] = numbers
    return found


def divided(item: object) -> tuple[float | str | None, dict[str, float]]:
    """The score and the named parts of one response's result: a number; None; a mapping, named tuple or data class with
    a field `score`; or a pair of score and mapping."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping):
        score, named = item
    elif isinstance(item, Mapping) or is_record(item):
        fields = dict(item) if isinstance(item, Mapping) else fields_of(item)
        key = next((key for key in NAMES_OF_SCORE if key in fields), None)
        if key is None:
            return f"{named_type(item)} without score (has {', '.join(map(str, fields))})", {}
        score, named = fields.pop(key), fields
    else:
        score, named = item, {}
    numbers = {str(name): value for name, given in named.items() if isinstance(value := plain(given), float)}
    return plain(score), numbers


def fields_of(record: object) -> dict[object, object]:
    """The fields of a named tuple or an object of a data class."""
    if isinstance(record, tuple):
        return dict(zip(vars(type(record))["_fields"], record, strict=True))
    fields: dict[object, object] = {}
    fields.update(vars(record).items())
    return fields


def plain(score: object) -> float | str | None:
    """A number of any library as a float, None as it is, anything else as text that describes it."""
    if score is None:
        return None
    if isinstance(score, str) or not isinstance(score, SupportsFloat):
        return f'"{score[:40]}"' if isinstance(score, str) else named_type(score)
    try:
        return float(score)
    except OverflowError:
        return "inf"
    except (TypeError, ValueError, RuntimeError):
        return named_type(score)  # an array of several numbers


def a_type(value: object) -> str:
    return f"of type {type(value).__name__}"


def named_type(value: object) -> str:
    return str(value) if value is None or isinstance(value, bool) else type(value).__name__


def describe(error: BaseException) -> str:
    """`rewards.py:44 ZeroDivisionError: division by zero`, with the last line outside the libraries."""
    package = str(Path(__file__).parents[2]) + os.sep  # rlhf.log raises for its caller
    libraries = ("<frozen", package, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno} " if own else ""
    text = " ".join(str(error).split())[:200]
    return f"{place}{type(error).__name__}" + (f": {text}" if text else "")


if __name__ == "__main__":
    run(serve)
