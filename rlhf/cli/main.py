"""The `rlhf` command. Heavy parts are imported by the command that needs them: help and check are instant."""

# ruff: noqa: PLC0415

import contextlib
import difflib
import errno
import importlib.util
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TextIO

from rlhf import __version__
from rlhf.config.renamed import RenamedSettingWarning
from rlhf.config.repeated import RepeatedFlagWarning
from rlhf.errors import ConfigError, PreemptedError, RlhfError
from rlhf.importing import importing, missing_extra
from rlhf.terminal import escape_unconfigured_logs, show_logs, show_traceback, stdout_is_closed, tell, write

if TYPE_CHECKING:
    from rlhf.actors.waiting import CallObserver

MAX_PROBLEMS_SHOWN = 20
SHOWN_OF_NAME = 60
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141
HELP = {"-h", "--help"}
TOOLS = ("sample", "curate", "rounds", "data", "reward", "bench", "report", "compare", "example", "doctor")
VERBS = ("train", "check", "plan", "generate", *TOOLS, "chaos", "quickstart", "completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors become lines on stderr; --debug adds the traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(partial(run, arguments), show_traceback="--debug" in arguments)


def exit_code_of(command: Callable[[], int], *, show_traceback: bool) -> int:
    """Run `command` and return its exit code. Warnings and errors become lines on stderr."""
    escape_unconfigured_logs()
    try:
        with _warnings_as_lines(), _tracebacks(show_traceback):
            return command()
    except BaseException as error:
        return _exit_code(_understood(error))


def run(arguments: list[str]) -> int:
    """Dispatch one command line.

    Raises:
        ConfigError: there is no such command.
        RlhfError: the command ended with it.
    """
    verb, *rest = arguments or ["--help"]
    if verb in {"--version", "-V", "version"}:
        return _show(f"rlhf {__version__}\n")
    if verb == "help" and rest:
        return run([*rest, "--help"])
    if verb in HELP or verb == "help":
        from rlhf.cli.help import main_help

        return _show(main_help())
    if verb in {"train", "check"}:
        return _train_or_check(verb, rest)
    if verb in TOOLS:
        return _tool(verb, rest)
    others = {
        "plan": _plan,
        "generate": _generate,
        "chaos": _chaos,
        "quickstart": _quickstart,
        "completion": _completion,
    }
    if verb in others:
        return others[verb](rest)
    raise ConfigError(f'unknown command "{verb}" (have {", ".join(VERBS)}).{_command_meant(verb)}')


def _command_meant(verb: str) -> str:
    """What an unknown command may have meant: one of a similar name, or a method that wants a command before it."""
    from rlhf.config.commands import COMMANDS

    if near := did_you_mean(verb.lower(), VERBS):
        return near
    method = verb if verb in COMMANDS else next(iter(difflib.get_close_matches(verb, COMMANDS, n=1)), None)
    return f" Did you mean `rlhf train {method}`?" if method is not None else ""


def _train_or_check(verb: str, arguments: list[str]) -> int:
    with importing():
        from rlhf.cli.help import commands_help
        from rlhf.cli.train_help import train_help

    if not arguments:
        return _show_usage(verb, commands_help(verb))
    command, rest = _method(verb, arguments)
    if command in HELP:
        return _show(commands_help(verb))
    if HELP & set(rest):
        return _show(train_help(verb, command, rest))
    from rlhf.cli.translated import show_translation

    show_translation(verb, command, rest)
    return check(command, rest) if verb == "check" else train(command, rest)


def check(command: str, arguments: Sequence[str]) -> int:
    """`rlhf check COMMAND`: print what differs from the defaults, or raise with every problem."""
    with importing():
        from rlhf.config.loading.load import short_summary
        from rlhf.launch.check import data_notes
        from rlhf.launch.full_check import checked_config
        from rlhf.launch.preflight import preflight

    config, advice = checked_config(command, arguments, os.environ)
    tell(f"rlhf: warning: {line}" for line in advice)

    found = preflight(config, os.environ)
    write("".join(f"{line}\n" for line in (*short_summary(config).splitlines(), *data_notes(config), *found.tried)))
    if found.episode is not None:
        from rlhf.cli.shown_row import show_episode

        show_episode(found.episode)
    lines = [
        f"Checked: {'; '.join(found.looked_at)}.",
        f"Not checked: {'; '.join(found.not_looked_at)}.",
        "No mistake was found.",
    ]
    return _show("".join(f"{line}\n" for line in lines))


def train(command: str, arguments: Sequence[str], observers: "Sequence[CallObserver]" = ()) -> int:
    """`rlhf train COMMAND`. `observers` see every wait for a remote call. Raises: the error that ended the run."""
    from rlhf.launch.full_check import checked_config

    config, advice = checked_config(command, arguments, os.environ)
    tell(f"rlhf: warning: {line}" for line in advice)
    with importing():
        from rlhf.launch.train import run_training
        from rlhf.orchestrator.run.console import make_console

    show_logs()
    with _tracebacks(config.cluster.debug and "--debug" not in arguments):
        run_training(config, make_console, observers)
    return 0


def _method(verb: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The method that a command line names, and its other words. A help flag may be in the method's place."""
    from rlhf.config.commands import COMMANDS, METHODS

    command, *rest = arguments
    for name, method in METHODS.items():
        if method.also_typed is not None and method.also_typed[0] == command and method.also_typed[1] in rest:
            return name, [word for word in rest if word != method.also_typed[1]]
    if command not in COMMANDS and command not in HELP:
        have = f'unknown method "{command}" (have {", ".join(COMMANDS)})'
        raise ConfigError(f"{verb}: {have}.{_method_meant(verb, command)}")
    return command, rest


def _method_meant(verb: str, word: str) -> str:
    """What a word in the method's place may have meant."""
    from rlhf.config.commands import COMMANDS

    if word.lower().endswith((".yaml", ".yml")):
        return f" The method comes before the file: `rlhf {verb} METHOD {word}`."
    return did_you_mean(word.lower().replace("_", "-"), COMMANDS)


def _plan(arguments: list[str]) -> int:
    with importing():
        from rlhf.cli.help import plan_help

    if HELP & set(arguments):
        return _show(plan_help())
    if not arguments:
        return _show_usage("plan", plan_help())
    from rlhf.cli.translated import show_translation
    from rlhf.config.loading.load_about_runs import load_calibrate, load_plan

    if any(word.startswith("--calibrate") for word in arguments):
        calibrate = load_calibrate(arguments)
        with importing():
            from rlhf.cli.calibrate import run_calibrate

        return run_calibrate(calibrate)
    command, rest = _method("plan", arguments)
    show_translation("plan", command, rest)
    options, config = load_plan(command, rest, os.environ)
    from rlhf.launch.check import require_context

    require_context(config, os.environ)
    with importing():
        from rlhf.cli.plan import run_plan

    return run_plan(command, config, options)


def _chaos(arguments: list[str]) -> int:
    from rlhf.cli.help import chaos_help

    if HELP & set(arguments):
        return _show(chaos_help())
    if not arguments:
        return _show_usage("chaos", chaos_help())
    from rlhf.cli.translated import show_translation
    from rlhf.config.loading.load_about_runs import load_chaos

    command, rest = _method("chaos", arguments)
    show_translation("chaos", command, rest)
    options, config = load_chaos(command, rest, os.environ)
    from rlhf.cli.chaos import run_chaos

    return run_chaos(command, config, options)


def _generate(arguments: list[str]) -> int:
    from rlhf.cli.help import generate_help

    if HELP & set(arguments):
        return _show(generate_help())
    if not arguments:
        return _show_usage("generate", generate_help())
    from rlhf.config.loading.load import load_generate

    config = load_generate(arguments)
    from rlhf.launch.trained_model import find_model

    assert config.model is not None, "the config's loader asked for it"
    if importlib.util.find_spec("torch") is not None:
        find_model(config.model)  # before torch is imported, which takes seconds
    with importing():
        from rlhf.cli.generate import run_generate

    return run_generate(config)


def _quickstart(arguments: list[str]) -> int:
    if HELP & set(arguments):
        from rlhf.cli.help import quickstart_help

        return _show(quickstart_help())
    from rlhf.config.loading.load import load_quickstart

    config = load_quickstart(arguments)
    from rlhf.cli.quickstart import run_quickstart

    return run_quickstart(config)


def _completion(arguments: list[str]) -> int:
    from rlhf.cli.completion import completion

    if len(arguments) != 1:
        raise ConfigError("completion: name a shell: bash, zsh or fish.")
    return _show(completion(arguments[0]))


def _tool(verb: str, arguments: list[str]) -> int:
    from rlhf.cli.tools import TOOLS as FOUND
    from rlhf.cli.tools import run_tool, tool_help

    if HELP & set(arguments):
        return _show(tool_help(verb))
    if not arguments and not FOUND[verb].is_bare:
        return _show_usage(verb, tool_help(verb))
    return run_tool(verb, arguments)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show warnings about settings in the format of other warnings."""
    of_settings = (RenamedSettingWarning, RepeatedFlagWarning)
    with warnings.catch_warnings():
        for kind in of_settings:
            warnings.simplefilter("default", kind)
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, of_settings):
                tell([f"rlhf: warning: {message}"])
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _tracebacks(shown: bool) -> Iterator[None]:
    """Print the traceback of an exception inside, and raise it again."""
    try:
        yield
    except BaseException as error:
        if shown:
            show_traceback(error)
        raise


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean X?`, or nothing if no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _show(text: str) -> int:
    write(text)
    return 0


def _show_usage(verb: str, text: str) -> int:
    """Show the help of a command that was given nothing to do, which is an error: a script's variable may be empty."""
    write(text)
    raise ConfigError(f"{verb}: nothing is named; the usage is above.")


def _understood(error: BaseException) -> BaseException:
    """Errors that a user can fix, as ConfigErrors, wherever they were raised: a name that no file can have, a library
    that an extra would have installed. Other errors as they are."""
    if (advice := missing_extra(error)) is not None:
        return ConfigError(advice)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)[:SHOWN_OF_NAME]
        return ConfigError(f"no such file: {name}... (longer than a file's name may be).")
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):
        return ConfigError("a path begins with ~ and the name of a user who has no home folder here. Write it in full.")
    return error


def _exit_code(error: BaseException) -> int:
    """Print what ended the command; the exit code says it to programs."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case KeyboardInterrupt():
            tell(["rlhf: interrupted."])
            return EXIT_INTERRUPTED
        case PreemptedError():
            tell([f"rlhf: {error}"])
            return error.exit_code
        case RlhfError():
            lines = lines_of(error)
            if type(error) is RlhfError and error.__cause__ is not None:
                lines[-1] += f". Traceback: {_saved_traceback(error)}"
            tell([f"rlhf: error: {line}" for line in lines])
            return error.exit_code
        case BrokenPipeError() if stdout_is_closed():
            return EXIT_CLOSED_PIPE
    tell([f"rlhf: error: internal: {type(error).__name__}: {first_line(error)}. Traceback: {_saved_traceback(error)}"])
    return EXIT_INTERNAL


def lines_of(error: RlhfError) -> list[str]:
    """One line for each problem, at most twenty."""
    problems = error.problems if isinstance(error, ConfigError) else (" ".join(str(error).split()),)
    lines = [" ".join(problem.split()) for problem in problems[:MAX_PROBLEMS_SHOWN]]
    hidden = len(problems) - len(lines)
    return [*lines, f"and {hidden} more."] if hidden else lines


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "no message").rstrip(".")


def _saved_traceback(error: BaseException) -> str:
    """Write the traceback to a file, and say which."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="rlhf-", suffix=".txt", delete=False) as file:
            file.write(text.encode(errors="backslashreplace"))
    except OSError:
        return "not written, there is no room for it; run again with --debug."
    return file.name


if __name__ == "__main__":
    sys.exit(main())
