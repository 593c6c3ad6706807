"""How libraries that make a million objects are imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Do not collect garbage while an import inside goes on. Nothing that modules are made of is garbage, and Python
    would look through all of it again each time that it has grown by a quarter: a fifth of the time that imports of
    torch, transformers, DeepSpeed or vLLM take."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
