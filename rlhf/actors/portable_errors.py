"""Errors that reach the driver as they are, whatever a worker raises.

Ray pickles an exception to send it. One that cannot be pickled, or cannot be built again on the other side, is replaced
by Ray with an error about pickling, or not delivered at all.
"""

import functools
import pickle
from collections.abc import Callable, Coroutine
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
MAX_TEXT = 600
"""Characters that are kept of an error's text."""


class ForeignError(Exception):
    """Stands for an exception that cannot be sent: its text is the other's class and text. It is raised from that, so
    that the traceback shows both."""


def with_portable_errors(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`method`, raising ForeignError in place of exceptions that cannot be sent."""

    @functools.wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            if is_portable(error):
                raise
            raise ForeignError(f"{type(error).__name__}: {short_text(error)}") from error

    return call


def with_portable_errors_async(
    method: Callable[Arguments, Coroutine[object, object, Result]],
) -> Callable[Arguments, Coroutine[object, object, Result]]:
    """As `with_portable_errors`."""

    @functools.wraps(method)
    async def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return await method(*args, **kwargs)
        except Exception as error:
            if is_portable(error):
                raise
            raise ForeignError(f"{type(error).__name__}: {short_text(error)}") from error

    return call


def is_portable(error: Exception) -> bool:
    """Whether an exception can be pickled and built again, with its class and text."""
    try:
        again = pickle.loads(pickle.dumps(error))
        return type(again) is type(error) and str(again) == str(error)
    except Exception:
        return False


def short_text(error: BaseException) -> str:
    """What an error says, in one line. Where it begins with a heading (`1 validation error for X`, or a line that ends
    in a colon), that alone would say nothing."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."
