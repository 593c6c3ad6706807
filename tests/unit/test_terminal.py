"""Text from outside cannot act on the terminal, and nothing but `rlhf.terminal` writes to it."""

import ast
import io
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import exit_code_of
from rlhf.errors import DataError, RewardError
from rlhf.terminal import counted, escaped, is_terminal, rich_console, tell, visible, write, write_line

ROOT = Path(__file__).parents[2] / "rlhf"
NASTY = "a\x1b[2Jb\r\x07\u202ec\x9b31m\ud800\x7f"
ESCAPED = r"a\x1b[2Jb\r\x07\u202ec\x9b31m\ud800\x7f"
OWN_FILES = {"actors/forked_worker.py", "actors/logs.py", "engines/process/user_code.py", "environments/child.py"}
"""Modules that write to stdout and stderr of a worker, which no terminal shows, or give them another file."""
FORBIDDEN = {
    "print": "print",
    "sys": "stdout stderr __stdout__ __stderr__",
    "logging": "basicConfig StreamHandler",
    "traceback": "print_exc print_exception print_stack print_tb",
    "warnings": "showwarning",
    "rich": "print",
}
"""Module -> its functions and streams that write to the terminal."""


def other_writes(source: str) -> list[str]:
    """Everything in `source` that writes to the terminal without `rlhf.terminal`."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="print" | "breakpoint" as name)):
                found.append(name)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if name in FORBIDDEN.get(module, "").split():
                found.append(f"{module}.{name}")
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="os"), attr="write"), args=[ast.Constant(value=1 | 2), *_]
            ):
                found.append("os.write")
            case ast.ImportFrom(module=str(module), names=names):
                wanted = FORBIDDEN.get(module, "").split()
                found += [f"{module}.{alias.name}" for alias in names if alias.name in wanted]
            case ast.Call(func=ast.Name(id="Console" | "RichConsole")):
                found.append("rich.console.Console")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_one_module_writes_to_the_terminal(path: Path) -> None:
    if path == ROOT / "terminal.py" or str(path.relative_to(ROOT)) in OWN_FILES:
        return
    assert set(other_writes(path.read_text())) <= {"warnings.showwarning"}


@pytest.mark.parametrize(
    "line",
    [
        "print(1)",
        "import sys\nsys.stdout.write('x')",
        "from sys import stderr",
        "import os\nos.write(2, b'x')",
        "import logging\nlogging.basicConfig()",
        "import traceback\ntraceback.print_exc()",
        "from rich.console import Console\nConsole().print(1)",
        "import rich\nrich.print(1)",
    ],
)
def test_another_way_to_the_terminal_is_seen(line: str) -> None:
    assert len(other_writes(line)) == 1


def test_one_of_a_thing_is_not_several() -> None:
    shown = [counted(number, noun) for number, noun in ((0, "row"), (1, "device"), (2, "group"), (2, "process"))]
    assert shown == ["0 rows", "1 device", "2 groups", "2 processes"]


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible(f"{NASTY}\n\té漢 x") == rf"{ESCAPED}\n\té漢 x"
    assert escaped(f"{NASTY}\n\té漢 x") == f"{ESCAPED}\n\té漢 x"
    write(f"{NASTY}\n")
    write_line(f"{NASTY}\nb")
    tell([NASTY, "a\nrlhf: error: b"])
    shown = capsys.readouterr()
    assert shown.out == f"{ESCAPED}\n{ESCAPED}\\nb\n"
    assert shown.err == f"{ESCAPED}\na\\nrlhf: error: b\n"
    assert not is_terminal(io.StringIO())


def test_a_rich_console_keeps_its_own_styles_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    rich_console(out, soft_wrap=True).print(f"[bold]own[/bold] {NASTY}", markup=True)
    assert "\x1b[1mown\x1b[0m" in out.getvalue()
    assert r"a\x1b[2Jb" in out.getvalue()
    assert not {"\x07", "\r", "\u202e", "\x9b", "\ud800", "\x7f"} & set(out.getvalue())


@pytest.mark.parametrize("error", [RewardError(f"row {NASTY}: no"), DataError([f"row {NASTY}: no"]), ValueError(NASTY)])
def test_an_error_line_is_escaped(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise error

    assert exit_code_of(command, show_traceback=True) in {3, 4, 70}
    shown = capsys.readouterr().err
    assert r"a\x1b[2Jb" in shown
    assert not {"\x1b", "\x07", "\r", "\u202e", "\x9b", "\ud800", "\x7f"} & set(shown)


def test_lines_of_a_log_are_escaped() -> None:
    script = (
        "import logging, rlhf.cli.main as m; "
        r"m.exit_code_of(lambda: logging.getLogger('rlhf.x').warning('row %s', 'a\x1b[2J') or 0, show_traceback=False)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr == "row a\\x1b[2J\n"


def test_what_libraries_write_goes_to_a_file(tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "from rlhf.terminal import library_output_to, write_line\n"
        "write_line('before')\n"
        "with library_output_to(Path('log')) as stream:\n"
        "    os.write(1, b'from C\\n'); os.write(2, b'warning from C\\n'); print('printed')\n"
        "    subprocess.run(['echo', 'from a child'])\n"
        "    write_line('own', stream)\n"
        "write_line('after')\n"
        "with library_output_to(Path('log')) as stream:\n"
        "    os.write(2, b'why\\n')\n"
        "    raise ValueError('broken')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.stdout == "before\nown\nafter\n"
    first, *_, last = result.stderr.splitlines()
    assert first == "rlhf: what the libraries wrote is in log"
    assert last == "ValueError: broken"
    logged = ["from C", "warning from C", "printed", "from a child", "why"]
    assert sorted((tmp_path / "log").read_text().splitlines()) == sorted(logged)
