"""Runs a user's reward function; started as a script by FunctionProcess, in a process of its own.

Imports only the standard library, so that it starts quickly and cannot shadow the user's modules. Exchanges JSON over
the socket whose file descriptor is the first argument: one setup, one hello, then a reply to each request.
"""

import importlib
import inspect
import json
import numbers
import os
import resource
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path


def main() -> None:
    """Serve until the parent closes the socket or ends."""
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    try:
        setup = json.loads(connection.recv_bytes())
        threading.Thread(target=exit_with_parent, args=(setup["parent"],), daemon=True).start()
        sys.path[:] = list(dict.fromkeys([str(Path.cwd()), *setup["path"]]))
        if setup["memory_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (setup["memory_bytes"],) * 2)
        function, hello = load(setup["function"])
        reply(connection, hello)
        while function is not None:
            reply(connection, answer(function, json.loads(connection.recv_bytes())))
    except (EOFError, ConnectionError):
        return


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
    """The function `module:name`, and a hello: the columns that it takes and needs, or what is wrong with it."""
    module, _, path = name.partition(":")
    try:
        found: object = importlib.import_module(module)
    except BaseException as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0])
        return None, {"wrong": f"no module {module} in {Path.cwd()}" if missing else f"{module}: {describe(error)}"}
    for part in path.split("."):
        if part not in vars(found):
            return None, {"wrong": f"{module} has no {path}"}
        found = vars(found)[part]
    function = found
    if not callable(function) or inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return None, {"wrong": f"{name} is not a plain function"}
    return inspected(function, name)


def inspected(function: Callable[..., object], name: str) -> tuple[Callable[..., object] | None, dict[str, object]]:
    """The function, and the columns that it takes (None: any) and needs besides prompts and responses."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None, {"wrong": f"{name} must accept (prompts, responses, **columns), has {signature}"}
    named = [p for p in parameters if p not in positional and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    needs = [p.name for p in named if p.default is p.empty]
    return function, {"takes": None if takes_all else [p.name for p in named], "needs": needs}


def answer(function: Callable[..., object], request: dict[str, object]) -> dict[str, object]:
    """Call the function on one request. Numbers are returned as they are, anything else as text that describes it."""
    prompts, columns = request["prompts"], request["columns"]
    assert isinstance(prompts, list), "the parent sends a list"
    assert isinstance(columns, dict), "the parent sends an object"
    try:
        result = function(prompts, request["responses"], **columns)
        # A set has no order, and a mapping's order is not that of the responses.
        if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping | Set):
            return {"wrong": f"the function returned {named_type(result)}, need a list of numbers"}
        return {"scores": [plain(score) for score in islice(result, len(prompts) + 1)]}
    except BaseException as error:
        return {"raised": describe(error)}


def plain(score: object) -> float | str:
    if isinstance(score, bool) or not isinstance(score, numbers.Real):
        return f'"{score[:40]}"' if isinstance(score, str) else named_type(score)
    try:
        return float(score)
    except OverflowError:
        return "inf"


def named_type(value: object) -> str:
    return str(value) if value is None or isinstance(value, bool) else type(value).__name__


def describe(error: BaseException) -> str:
    """`rewards.py:44 ZeroDivisionError: division by zero`, with the last line outside the libraries."""
    libraries = ("<frozen", __file__, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno} " if own else ""
    text = " ".join(str(error).split())[:200]
    return f"{place}{type(error).__name__}" + (f": {text}" if text else "")


if __name__ == "__main__":
    main()
