"""Scripts that complete the commands, methods and flags of `rlhf` in bash, zsh and fish."""

import shlex
from collections.abc import Iterator, Mapping

from rlhf.cli.help import flag_of
from rlhf.cli.tools import TOOLS
from rlhf.config.base import Section
from rlhf.config.commands import COMMANDS, METHODS
from rlhf.config.fields import Field, fields_by_name
from rlhf.config.loading.flags import ALIASES
from rlhf.config.tools import ChaosConfig, GenerateConfig, PlanConfig, QuickstartConfig
from rlhf.errors import ConfigError

RUN_VERBS = ("train", "check", "plan", "chaos")
"""Commands that take a method and the flags of its run."""
OWN: Mapping[str, type[Section]] = {
    "plan": PlanConfig,
    "chaos": ChaosConfig,
    "generate": GenerateConfig,
    "quickstart": QuickstartConfig,
    **{name: tool.config for name, tool in TOOLS.items()},
}
"""The flags that a command has itself."""
VERBS = (*dict.fromkeys((*RUN_VERBS, *OWN, "completion")),)


def completion(shell: str) -> str:
    """The script for `shell`: bash, zsh or fish.

    Raises:
        ConfigError: there is none for this shell.
    """
    if shell not in SHELLS:
        raise ConfigError(f'completion: must be one of {", ".join(SHELLS)} (got "{shell}").')
    return SHELLS[shell]()


def _flags(config: type[Section]) -> dict[str, Field]:
    """Flags and the fields that they set, short names too."""
    fields = fields_by_name(config)
    short = {flag_of(alias): fields[name] for alias, name in ALIASES.items() if name in fields}
    return {**{flag_of(name): field for name, field in fields.items()}, **short}


def _choices() -> dict[str, list[str]]:
    """Flags with a fixed set of values, over all commands."""
    found: dict[str, dict[str, None]] = {}
    for config in (*(method.config for method in METHODS.values()), *OWN.values()):
        for flag, field in _flags(config).items():
            if field.choices:
                found.setdefault(flag, {}).update(dict.fromkeys(map(str, field.choices)))
    return {flag: list(values) for flag, values in found.items()}


def _bash() -> str:
    methods = " ".join(COMMANDS)
    lines = [BASH_HEAD.format(verbs=" ".join(VERBS), run_verbs="|".join(RUN_VERBS), methods=methods)]
    lines += [f"    {flag}) words={shlex.quote(' '.join(values))} ;;" for flag, values in _choices().items()]
    lines.append(BASH_VALUES)
    for name, method in METHODS.items():
        names = "|".join(other.name for other in COMMANDS.values() if other.method == name)
        lines.append(f"    {names}) words={shlex.quote(' '.join(_flags(method.config)))} ;;")
    lines.append(BASH_METHODS)
    lines += [f"    {verb}) words+={shlex.quote(' ' + ' '.join(_flags(config)))} ;;" for verb, config in OWN.items()]
    lines.append(BASH_END)
    return "\n".join(lines)


def _zsh() -> str:
    return f"#compdef rlhf\nautoload -U +X bashcompinit && bashcompinit\n{_bash()}"


def _fish() -> str:
    return "\n".join(["complete -c rlhf -e", *_fish_lines()]) + "\n"


def _fish_lines() -> Iterator[str]:
    runs = f"__fish_seen_subcommand_from {' '.join(RUN_VERBS)}"
    yield f"complete -c rlhf -f -n __fish_use_subcommand -a {shlex.quote(' '.join(VERBS))}"
    methods = " ".join(COMMANDS)
    yield (f"complete -c rlhf -f -n '{runs}; and not __fish_seen_subcommand_from {methods}' -a {shlex.quote(methods)}")
    for name, method in METHODS.items():
        names = " ".join(other.name for other in COMMANDS.values() if other.method == name)
        yield from _fish_flags(f"{runs}; and __fish_seen_subcommand_from {names}", method.config)
    for verb, config in OWN.items():
        yield from _fish_flags(f"__fish_seen_subcommand_from {verb}", config)


def _fish_flags(condition: str, config: type[Section]) -> Iterator[str]:
    for flag, field in _flags(config).items():
        values = f" -xa {shlex.quote(' '.join(map(str, field.choices)))}" if field.choices else ""
        takes = "" if field.kind is bool or values else " -r"
        meaning = field.meaning.partition(". ")[0].rstrip(".")
        yield (
            f"complete -c rlhf -n {shlex.quote(condition)} -l {flag.removeprefix('--')}{takes}{values} "
            f"-d {_fish_quoted(meaning)}"
        )


def _fish_quoted(text: str) -> str:
    """Inside single quotes fish reads only backslashes and quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


BASH_HEAD = """\
# Completes rlhf. Load it with: source <(rlhf completion bash)
_rlhf() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}"
  local verb="${{COMP_WORDS[1]}}" method="${{COMP_WORDS[2]}}" words=""
  COMPREPLY=()
  if [[ $COMP_CWORD -eq 1 ]]; then
    COMPREPLY=($(compgen -W "{verbs}" -- "$cur")); return
  fi
  case "$verb" in
    {run_verbs})
      if [[ $COMP_CWORD -eq 2 && $cur != -* ]]; then
        COMPREPLY=($(compgen -W "{methods}" -- "$cur")); return
      fi ;;
    completion) COMPREPLY=($(compgen -W "bash zsh fish" -- "$cur")); return ;;
  esac
  case "$prev" in"""
BASH_VALUES = """\
  esac
  if [[ -n $words && $cur != -* ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$cur")); return
  fi
  [[ $cur == -* ]] || return
  words=""
  case "$verb" in
    train|check|plan|chaos)
  case "$method" in"""
BASH_METHODS = """\
  esac ;;
  esac
  case "$verb" in"""
BASH_END = """\
  esac
  COMPREPLY=($(compgen -W "$words --help" -- "$cur"))
}
complete -o default -F _rlhf rlhf
"""
SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
