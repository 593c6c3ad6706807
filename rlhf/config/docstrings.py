"""The docstrings of attributes, which are the help texts of settings. They are read from the source when help is shown:
pydantic would read them with each import, which takes as long as the rest of it."""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache


def attribute_docs(kinds: Sequence[type]) -> Mapping[str, str]:
    """Attribute -> docstring, empty if it has none, of classes of which each overrides those before it."""
    found: dict[str, str] = {}
    for kind in kinds:
        found |= _docs_in(kind.__module__).get(kind.__qualname__, {})
    return found


@cache
def _docs_in(module: str) -> Mapping[str, Mapping[str, str]]:
    """The same of every class of a module, by its qualified name; of a module without source, of none."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    return dict(_classes(tree.body, ""))


def _classes(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    for statement in body:
        match statement:
            case ast.ClassDef(name=name, body=inside):
                yield f"{prefix}{name}", _attributes(inside)
                yield from _classes(inside, f"{prefix}{name}.")
            case ast.FunctionDef(name=name, body=inside):
                yield from _classes(inside, f"{prefix}{name}.<locals>.")


def _attributes(body: Sequence[ast.stmt]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found[statement.target.id] = inspect.cleandoc(text)
                case _:
                    found[statement.target.id] = ""
    return found
