"""The user's reward function, checked without running its code."""

import ast
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


def import_name(target: object) -> str:
    """`module:name` of a function, class or other object at the top of a module: what a worker process imports.

    Raises:
        ValueError: no other process could import it.
    """
    module_name = target.__module__
    module = sys.modules.get(module_name)
    found = next((name for name, value in vars(module).items() if value is target), None) if module else None
    if found is None:
        raise ValueError(f"{target!r} is not at the top of a module, so that workers cannot import it")
    if module_name == "__main__":
        file = vars(module).get("__file__")
        if file is None or Path(file).suffix != ".py":
            raise ValueError(
                f"{found} is defined in a notebook or prompt, which workers cannot import. "
                "Write it to a .py file and import it from there"
            )
        module_name = Path(file).stem
    return f"{module_name}:{found}"


def problem_of(name: str, folders: Sequence[str]) -> str | None:
    """Why `module:name` cannot be imported as a reward function; None if nothing is known to be wrong with it.

    Modules are searched in `folders`. Only Python source can be inspected, and it is not run: what the function's
    parameters mean is decided when it is imported, in its own process.
    """
    module, _, function = name.partition(":")
    spec = find_module(module, folders)
    if spec is None:
        return f"no module {module} in {folders[0] or 'this folder'} or on the Python path."
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    source = Path(spec.origin)
    try:
        tree = ast.parse(source.read_bytes(), filename=str(source))
    except SyntaxError as error:
        return f"{source}:{error.lineno}: {error.msg}."
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        return f"{source} cannot be read: {error}."
    return None if _may_bind(tree, function.partition(".")[0]) else f"{source} defines no {function}."


def find_module(module: str, folders: Sequence[str]) -> ModuleSpec | None:
    """Where a module is, without importing it or its packages."""
    places: Sequence[str] | None = folders
    spec = None
    parts = module.split(".")
    for n in range(len(parts)):
        if places is None:
            return None
        # By its last name alone: with the full name, a folder without __init__.py needs its parent imported.
        spec = PathFinder.find_spec(parts[n], list(places))
        if spec is None:
            return None
        if spec.origin is None:
            places = [str(Path(place) / parts[n]) for place in places if (Path(place) / parts[n]).is_dir()]
        else:
            places = spec.submodule_search_locations
    return spec


def _may_bind(tree: ast.Module, name: str) -> bool:
    """Whether top-level code of a module could bind `name`."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=known, ctx=ast.Store()) if known == name:
                return True
            case ast.alias(name=imported, asname=asname) if (asname or imported.partition(".")[0]) in (name, "*"):
                return True
            case ast.ClassDef(name=known) | ast.FunctionDef(name=known) | ast.AsyncFunctionDef(name=known) if (
                known == name
            ):
                return True
    return False
