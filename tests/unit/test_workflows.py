"""The files that a forge reads are valid by its schemas, and the workflows run what a developer runs: make targets."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from rlhf import __version__

ROOT = Path(__file__).parents[2]
FORGE = ROOT / ".github"
WORKFLOWS = sorted((FORGE / "workflows").glob("*.yml"))
ISSUE_FORMS = [path for path in sorted((FORGE / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
SCHEMAS = [
    ("github-workflows", WORKFLOWS),
    ("github-issue-forms", ISSUE_FORMS),
    ("github-issue-config", [FORGE / "ISSUE_TEMPLATE" / "config.yml"]),
    ("dependabot", [FORGE / "dependabot.yml"]),
    ("citation-file-format", [ROOT / "CITATION.cff"]),
]
CHECKER = Path(sys.executable).parent / "check-jsonschema"
MAKE = re.compile(r"make (?:--silent )?([\w-]+)(?: TAG=\S+ > \S+)?")
Tree = TypeAdapter(dict[object, object])
"""YAML 1.1 reads the key `on` of a workflow as true, so not every key is text."""


def problems(schema: str, *files: Path) -> str:
    """What the schema finds wrong with the files, or nothing."""
    command = [CHECKER, "--builtin-schema", f"vendor.{schema}", *files]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def commands(tree: object) -> Iterator[str]:
    """Every `run` of a workflow."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "run":
                yield str(value)
            else:
                yield from commands(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from commands(value)


@pytest.mark.parametrize(("schema", "files"), SCHEMAS, ids=[schema for schema, _ in SCHEMAS])
def test_a_file_is_valid_by_its_schema(schema: str, files: list[Path]) -> None:
    assert files
    assert problems(schema, *files) == ""


def test_the_schema_finds_what_is_wrong(tmp_path: Path) -> None:
    workflow = tmp_path / "ci.yml"
    workflow.write_text("on: push\njobs: {lint: {steps: [{run: make lint}]}}\n", encoding="utf-8")
    assert "runs-on" in problems("github-workflows", workflow)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_make_targets(workflow: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {name for line in re.findall(r"^([\w -]+):", makefile, flags=re.MULTILINE) for name in line.split()}
    found = [*commands(yaml.safe_load(workflow.read_text(encoding="utf-8")))]
    assert found
    for command in found:
        if command.startswith("gh release create "):
            continue
        match = MAKE.fullmatch(command)
        assert match is not None, command
        assert match[1] in targets, command


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_only_a_release_may_write(workflow: Path) -> None:
    permissions = Tree.validate_python(yaml.safe_load(workflow.read_text(encoding="utf-8")))["permissions"]
    assert permissions == {"contents": "write" if workflow.name == "release.yml" else "read"}


def test_the_hooks_call_tools_that_the_development_environment_has() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    for hook in hooks:
        folder, tool = hook["entry"].split()[0].rsplit("/", 1)
        assert folder == ".venv/bin"
        assert (Path(sys.executable).parent / tool).is_file()


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
