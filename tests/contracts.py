"""What this project's code needs of vLLM, DeepSpeed, Ray, transformers and their kin, checked against their sources.

    python -m tests.contracts                      # the installed packages
    python -m tests.contracts vllm-0.33.0.whl      # a wheel, which is read and not imported: also one for GPUs
    python -m tests.contracts vllm==0.33.0         # the same, downloaded first

Most of the contract is read from our own code: each name that it imports must be defined where it is imported from,
each keyword of a call of such a name must be a parameter of it, and vLLM must know each variable of the environment
that is set for it. What we reach through objects stands in `reached.py`.
"""

import argparse
import ast
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from tests.reached import REACHED

ROOT = Path(__file__).parents[1]
LIBRARIES = ("vllm", "deepspeed", "ray", "transformers", "peft", "flash_attn", "bitsandbytes")
ENVIRONMENT = re.compile(r"VLLM_[A-Z0-9_]+")
"""Variables of the environment that vLLM reads."""
MAX_HOPS = 12
"""Longest chain of modules that import a name from each other."""


class Sources:
    """The Python sources of one package, by module name."""

    def __init__(self, package: str, version: str, read: Callable[[PurePosixPath], str | None]) -> None:
        """`read` gives the text of a file, by its path from the folder of packages; None where there is none."""
        self.package = package
        self.version = version
        self._read = read

    @staticmethod
    def installed(package: str) -> "Sources | None":
        """Those of an installed package, which is not imported."""
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            return None
        folder = Path(found.origin).parents[1]

        def read(path: PurePosixPath) -> str | None:
            file = folder / path
            return file.read_text(encoding="utf-8") if file.is_file() else None

        return Sources(package, "as installed", read)

    @staticmethod
    def of_wheel(wheel: Path) -> "Sources":
        """Those in a wheel."""
        archive = zipfile.ZipFile(wheel)
        names = frozenset(archive.namelist())
        tops = {PurePosixPath(name).parts[0] for name in names}
        package = next((library for library in LIBRARIES if library in tops), None)
        if package is None:
            raise SystemExit(f"{wheel}: none of {', '.join(LIBRARIES)} is in it")

        def read(path: PurePosixPath) -> str | None:
            return archive.read(str(path)).decode("utf-8") if str(path) in names else None

        return Sources(package, wheel.name.split("-")[1], read)

    @cache  # noqa: B019  - one object a package, for the life of the program
    def text(self, module: str) -> tuple[str, bool] | None:
        """The source of a module, and whether it is a package; None where it has no Python source."""
        path = PurePosixPath(*module.split("."))
        for file, is_package in ((path / "__init__.py", True), (path.parent / f"{path.name}.py", False)):
            if (text := self._read(file)) is not None:
                return text, is_package
        return None

    @cache  # noqa: B019
    def tree(self, module: str) -> tuple[ast.Module, bool]:
        """The same, parsed. Raises LookupError where it has no Python source."""
        found = self.text(module)
        if found is None:
            raise LookupError(module)
        return ast.parse(found[0]), found[1]

    def may_have(self, module: str, name: str) -> bool:
        """Whether a module can have a name, by a look at its text: parsing all that transformers has takes a minute."""
        found = self.text(module)
        return found is not None and (name in found[0] or "import *" in found[0])


@dataclass(frozen=True, slots=True)
class Use:
    """A name that our code takes from a library, and the keywords that it calls it with."""

    module: str
    name: str
    keywords: frozenset[str]
    place: str
    """`file:line`"""


def uses_in(text: str, file: str) -> Iterator[Use]:
    """What a file of ours takes from the libraries."""
    tree = ast.parse(text)
    names: dict[str, tuple[str, str]] = {}
    modules = {library: library for library in LIBRARIES}  # some are loaded by a function, under their own name
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            for alias in node.names:
                names[alias.asname or alias.name] = (node.module or "", alias.name)
                yield Use(node.module or "", alias.name, frozenset(), f"{file}:{node.lineno}")
        elif isinstance(node, ast.Import):
            modules |= {one.asname or one.name: one.name for one in node.names if one.name.split(".")[0] in LIBRARIES}

    def imported(node: ast.expr) -> tuple[str, str] | None:
        """Module and name of an expression that is an imported name, or an attribute of an imported module."""
        if isinstance(node, ast.Name):
            return names.get(node.id)
        path = ast.unparse(node).split(".")
        if isinstance(node, ast.Attribute) and path[0] in modules and all(part.isidentifier() for part in path):
            return ".".join([modules[path[0]], *path[1:-1]]), path[-1]
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and ENVIRONMENT.fullmatch(str(node.value)):
            yield Use("vllm.envs", str(node.value), frozenset(), f"{file}:{node.lineno}")
        if isinstance(node, ast.Call) and (called := imported(node.func)) is not None:
            keywords = frozenset(keyword.arg for keyword in node.keywords if keyword.arg)
            yield Use(*called, keywords, f"{file}:{node.lineno}")
        elif isinstance(node, ast.Attribute) and (taken := imported(node)) is not None:
            yield Use(*taken, frozenset(), f"{file}:{node.lineno}")


def our_uses() -> list[Use]:
    """What the package takes from the libraries."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "rlhf").rglob("*.py"))}
    touch = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(LIBRARIES)})\b|{ENVIRONMENT.pattern}", re.MULTILINE)
    touching = {path: text for path, text in texts.items() if touch.search(text)}
    return [use for path, text in touching.items() for use in uses_in(text, str(path.relative_to(ROOT)))]


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Found:
    """A name that a module has; `node` is None where it is neither a class nor a function with a source."""

    module: str
    node: Definition | None = None


@cache
def find(sources: Sources, module: str, name: str, hops: int = MAX_HOPS) -> Found | None:
    """What `name` is in `module`, through the modules that this takes it from; None if it has no such name."""
    found: Found | None = None
    if hops and sources.may_have(module, name):
        bound, stars = _bindings(sources, module)
        entry = bound.get(name)
        if isinstance(entry, Found):
            return entry
        origins = [entry] if entry is not None else [(star, name) for star in stars]
        every = (find(sources, origin, there, hops - 1) for origin, there in origins)
        found = next((one for one in every if one is not None), None)
        found = found or _lazy(sources, module, name, hops)
    return found or (Found(f"{module}.{name}") if sources.text(f"{module}.{name}") is not None else None)


@cache
def _bindings(sources: Sources, module: str) -> tuple[Mapping[str, Found | tuple[str, str]], Sequence[str]]:
    """What a module binds to each name: a definition, or another module's name. And the modules it imports whole."""
    tree, is_package = sources.tree(module)
    bound: dict[str, Found | tuple[str, str]] = {}
    stars: list[str] = []
    for node in _statements(tree.body):
        if isinstance(node, Definition):
            bound[node.name] = Found(module, node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            bound |= dict.fromkeys(_targets(node), Found(module))
        elif isinstance(node, ast.Import):
            bound |= dict.fromkeys((one.asname or one.name.split(".")[0] for one in node.names), Found(module))
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, module, is_package)
            # Another package's name, or an extension's, is taken to be there.
            is_open = origin.split(".")[0] == sources.package and sources.text(origin) is not None
            for alias in node.names:
                if alias.name != "*":
                    bound[alias.asname or alias.name] = (origin, alias.name) if is_open else Found(module)
                elif is_open:
                    stars.append(origin)
    return bound, stars


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at the level of a module, also inside `if`, `try` and `with`."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, inner, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [one for target in targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return {target.id for target in flat if isinstance(target, ast.Name)}


def _origin(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def _lazy(sources: Sources, module: str, name: str, hops: int) -> Found | None:
    """A name that a module loads when it is asked for it: a table has the name and, beside or above it, its module; or
    the module's `__getattr__` compares with it."""
    entries = (
        (key.value, {one.value for one in ast.walk(value) if isinstance(one, ast.Constant)})
        for table in ast.walk(sources.tree(module)[0])
        if isinstance(table, ast.Dict)
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    )
    for key, listed in entries:
        if name in listed:  # {"configuration_utils": ["PretrainedConfig"]}
            return find(sources, f"{module}.{key}", name, hops - 1)
        targets = [one for one in listed if isinstance(one, str) and ":" in one]
        if key == name and targets:  # {"LLM": ".entrypoints.llm:LLM"}
            origin, there = targets[0].split(":")
            return find(sources, f"{module}{origin}" if origin.startswith(".") else origin, there, hops - 1)
    getter = _bindings(sources, module)[0].get("__getattr__")
    compared = ast.walk(getter.node) if isinstance(getter, Found) and getter.node is not None else ()
    is_made = any(isinstance(one, ast.Constant) and one.value == name for one in compared)
    return Found(module) if is_made else None


def parameters(sources: Sources, found: Found, hops: int = MAX_HOPS) -> set[str] | None:
    """The keywords that a definition takes; None where it takes any, or where its source does not show them."""
    node = found.node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None if _is_overload(node) else _signature(node)
    if not isinstance(node, ast.ClassDef) or not hops:
        return None
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return _signature(statement)
    named = {
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    for base in node.bases:
        if not isinstance(base, ast.Name):
            return None
        above = find(sources, found.module, base.id)
        inherited = None if above is None else parameters(sources, above, hops - 1)
        if inherited is None:
            return None
        named |= inherited
    return named if named else None


def _is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(one, ast.Name) and one.id == "overload" for one in node.decorator_list)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str] | None:
    if node.args.kwarg is not None:
        return None
    return {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}


def attributes(sources: Sources, found: Found, hops: int = MAX_HOPS) -> set[str]:
    """The attributes and methods that a class and its bases define, `self.x = ...` included."""
    if not isinstance(found.node, ast.ClassDef) or not hops:
        return set()
    names = {node.name for node in ast.walk(found.node) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in ast.walk(found.node):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            names |= _targets(node)
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.attr for target in targets if isinstance(target, ast.Attribute)}
    for base in found.node.bases:
        if isinstance(base, ast.Name) and (above := find(sources, found.module, base.id)) is not None:
            names |= attributes(sources, above, hops - 1)
    return names


def broken(sources: Sources, uses: Sequence[Use], reached: Mapping[str, Sequence[str]]) -> list[str]:
    """What of the contract `sources` does not hold, one line each."""
    problems = []
    for use in uses:
        if use.module.split(".")[0] != sources.package:
            continue
        found = find(sources, use.module, use.name)
        if found is None:
            if not (_is_compiled(sources, use.module) or _is_attribute(sources, use)):
                problems.append(f"{use.place}: {use.module} has no {use.name}")
            continue
        known = parameters(sources, found)
        if known is not None and (unknown := use.keywords - known):
            problems.append(f"{use.place}: {use.module}.{use.name} takes no {', '.join(sorted(unknown))}")
    for place, wanted in reached.items():
        module, name = place.split(":")
        if module.split(".")[0] != sources.package:
            continue
        found = find(sources, module, name)
        have = set() if found is None else attributes(sources, found)
        if found is None:
            problems.append(f"{module} has no {name}")
        problems += [f"{module}.{name} has no {one}" for one in wanted if found is not None and one not in have]
    return sorted(set(problems))


def _is_attribute(sources: Sources, use: Use) -> bool:
    """Whether a name is one of a class that stands where a module could, as in `ray.actor.ActorClass.options`."""
    module, _, name = use.module.rpartition(".")
    found = find(sources, module, name) if module and sources.text(use.module) is None else None
    return found is not None and (found.node is None or use.name in attributes(sources, found))


def _is_compiled(sources: Sources, module: str) -> bool:
    """Whether a module has no Python source while the package around it has (an extension)."""
    return sources.text(module) is None and sources.text(module.rpartition(".")[0]) is not None and "._" in module


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement such as `vllm==0.33.0`, without what it requires."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    return next(folder.glob("*.whl"))


def main(arguments: Sequence[str]) -> int:
    """Print what is broken, package by package. Returns 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m tests.contracts", description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*", help="wheels, or requirements such as vllm==0.33.0; default: installed")
    wheels = parser.parse_args(arguments).wheels
    uses = our_uses()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for index, wheel in enumerate(wheels):
            folder = Path(temporary) / str(index)
            folder.mkdir()
            path = Path(wheel) if wheel.endswith(".whl") else download(wheel, folder)
            failed |= report(Sources.of_wheel(path), uses)
            if not wheel.endswith(".whl"):
                path.unlink()
        for library in LIBRARIES if not wheels else ():
            if (sources := Sources.installed(library)) is not None:
                failed |= report(sources, uses)
    return int(failed)


def report(sources: Sources, uses: Sequence[Use]) -> bool:
    """Print the state of one package; whether anything of it is broken."""
    problems = broken(sources, uses, REACHED)
    count = sum(use.module.split(".")[0] == sources.package for use in uses)
    count += sum(len(wanted) for place, wanted in REACHED.items() if re.match(rf"{sources.package}\b", place))
    print(f"{sources.package} {sources.version}: {count} uses, {len(problems)} broken")  # noqa: T201
    for problem in problems:
        print(f"  {problem}")  # noqa: T201
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
