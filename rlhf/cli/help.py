"""Help texts, generated from the config's docstrings."""

import json
import shutil
import textwrap

from pydantic_core import PydanticUndefined

from rlhf.config.commands import COMMANDS, METHODS
from rlhf.config.fields import Field, fields_of
from rlhf.config.loading.flags import ALIASES
from rlhf.config.tools import ChaosConfig, GenerateConfig, PlanConfig, QuickstartConfig

INDENT = 6
MAIN_WIDTH = 118


def kind_of(field: Field) -> str:
    """The values that a field takes, as shown in help."""
    if field.choices:
        return "|".join(field.words)
    if field.is_list:
        return "TEXT" if field.holds_text else "LIST"
    names = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return next((name for kind, name in names.items() if field.kind is kind), "VALUE")


def default_of(field: Field) -> str:
    """A field's default as YAML; empty if there is none."""
    default = field.default
    if default is None or default is PydanticUndefined or default in ((), "", {}):
        return ""
    return default if isinstance(default, str) and default.isprintable() else json.dumps(default)


def bounds_and_variant(field: Field) -> str:
    """The numbers that are allowed, and the types that have the field if not all do."""
    facts = [field.bounds, f"only with type {' or '.join(field.owners)}" if len(field.owners) in range(1, 4) else ""]
    return "; ".join(fact for fact in facts if fact)


def facts_of(field: Field) -> str:
    """Default and limits, in brackets."""
    facts = [f"default {default_of(field)}" if default_of(field) else "", bounds_and_variant(field)]
    return f" [{'; '.join(fact for fact in facts if fact)}]" if any(facts) else ""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def field_help(field: Field, width: int) -> str:
    """A flag and its help text."""
    short = next((alias for alias, name in ALIASES.items() if name == field.name), None)
    names = ", ".join(flag_of(name) for name in (field.name, short) if name)
    text = field.meaning + facts_of(field)
    body = textwrap.fill(text, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
    return f"  {names} {kind_of(field)}\n{body}\n"


def screen_width() -> int:
    return max(40, min(shutil.get_terminal_size((100, 24)).columns, 110))


def main_help() -> str:
    """Help of `rlhf`."""
    lines = [f"or one of their members: {member_lines()}."]
    lines += [f"`{' '.join(m.also_typed)}` is {name}." for name, m in METHODS.items() if m.also_typed is not None]
    members = "\n".join(textwrap.fill(line, MAIN_WIDTH, break_on_hyphens=False) for line in lines)
    return MAIN_HEAD.format(names=",".join(METHODS), members=members)


def member_lines() -> str:
    """The members of each method that has some, as one sentence."""
    found = {name: [c.name for c in COMMANDS.values() if c.method == name != c.name] for name in METHODS}
    return "; ".join(f"{', '.join(members)} ({name})" for name, members in found.items() if members)


def plan_help() -> str:
    """Help of `rlhf plan`: its own flags; the flags of a run are in `rlhf train METHOD --help`."""
    return PLAN_HEAD.format(names=",".join(METHODS)) + "\n".join(
        field_help(field, screen_width()) for field in fields_of(PlanConfig)
    )


def chaos_help() -> str:
    """Help of `rlhf chaos`: its own flags; the flags of a run are in `rlhf train METHOD --help`."""
    return CHAOS_HEAD.format(names=",".join(METHODS)) + "\n".join(
        field_help(field, screen_width()) for field in fields_of(ChaosConfig)
    )


def generate_help() -> str:
    """Help of `rlhf generate`."""
    fields = [field_help(field, screen_width()) for field in fields_of(GenerateConfig) if field.name != "model"]
    return GENERATE_HEAD + "\n".join(fields)


def quickstart_help() -> str:
    """Help of `rlhf quickstart`."""
    return QUICKSTART_HEAD + "\n".join(field_help(field, screen_width()) for field in fields_of(QuickstartConfig))


def commands_help(verb: str) -> str:
    """Help of `rlhf train` or `rlhf check` without a method."""
    lines = [f"  {name:11} {method.summary}" for name, method in METHODS.items()]
    lines += [
        "",
        textwrap.fill(
            f"Members of a method can be named directly: {member_lines()}.", screen_width(), break_on_hyphens=False
        ),
    ]
    return COMMANDS_HEAD.format(verb=verb, names=",".join(METHODS)) + "\n".join(lines) + "\n"


MAIN_HEAD = """\
Usage: rlhf COMMAND ...

Trains language models from feedback on a Ray cluster.

  rlhf train METHOD [CONFIG.yaml] [--section.key value ...]   train a model
  rlhf check METHOD [CONFIG.yaml] [--section.key value ...]   find what can be known to be wrong, starting nothing
  rlhf plan METHOD [CONFIG.yaml] [--cluster 16x8xH100]        where models would live, what they hold, how long it takes
  rlhf generate MODEL [--prompt TEXT ...]                     sample responses from a trained model
  rlhf sample MODEL --data.path ROWS --out SAMPLES.jsonl      sample and score responses to every prompt
  rlhf curate METHOD SAMPLES.jsonl --out DATA.jsonl           choose training data from scored samples
  rlhf rounds {{sft,dpo}} --model MODEL --data.path ROWS        sample, choose and train in rounds
  rlhf data KIND --data.path ROWS                             show what is in a data set, and what is wrong with it
  rlhf reward try FILE.py:FUNCTION --data.path ROWS           call a reward function on rows: arguments, scores, time
  rlhf bench sync [--policy.num-gpus-per-node N ...]          how fast weights reach the engines of this cluster
  rlhf report RUN [RUN ...]                                   write a page about a run, or several: curves, events
  rlhf compare RUN RUN [RUN ...]                              runs side by side, and which one did best
  rlhf doctor [RUN]                                           what this machine lacks, or what happened to a run
  rlhf chaos METHOD [CONFIG.yaml]                             a run with injected faults, compared with one without
  rlhf quickstart                                             see the three steps of RLHF on a tiny model
  rlhf example stories                                        make the model and the rows that the CPU configs use
  rlhf completion {{bash,zsh,fish}}                             a script that completes commands and flags
  rlhf --version                                              print the version

METHOD is one of {{{names}}},
{members}

`rlhf train ppo --help` shows the settings that people change, `--help SECTION` those of a section, `--help WORD` those
about a word, `--help all` every one. `rlhf completion bash` (or zsh, fish) completes commands and flags.

Exit codes: 0 done, 2 config, 3 data or model, 4 reward, 5 checkpoint or disk, 6 numerics, 7 worker lost, 8 stall,
70 internal, 75 stopped and resumable, 130 interrupted.
"""
COMMANDS_HEAD = """\
Usage: rlhf {verb} {{{names}}} [CONFIG.yaml] [--section.key value ...]

"""
PLAN_HEAD = """\
Usage: rlhf plan {{{names}}} [CONFIG.yaml] [--section.key value ...] [options]

Shows where a run's models would live, what each device would hold phase by phase and how long a step would take,
before anything starts; of models it reads config.json alone. Takes every flag of `rlhf train METHOD` too. Exits with
2 if the run does not fit, and shows with which settings it would.

`rlhf plan --calibrate RUN [--cluster 2x8xH100]` shows what a finished run measured next to what was planned for it, and
keeps the factors for --calibration.

"""
CHAOS_HEAD = """\
Usage: rlhf chaos {{{names}}} [CONFIG.yaml] [--section.key value ...] [options]

Runs a config twice, without and with faults: processes of one kind after another are killed or stopped, each in
another phase of a step, and the newest checkpoint is damaged. Both runs must end with the same weights (on CPU, where
rollouts do not run ahead). Takes every flag of `rlhf train METHOD` too. For --kinds stop, lower the deadlines first:
train.step_timeout_s and rollout.generate_timeout_s.

"""
GENERATE_HEAD = """\
Usage: rlhf generate MODEL [--prompt TEXT ... | --prompts FILE] [options]

Samples responses from a trained model, a folder or hub name.

"""
QUICKSTART_HEAD = """\
Usage: rlhf quickstart [options]

The three steps of RLHF (sft, rm, ppo) on a tiny model of its own, in minutes, with a table of what was learned.

"""
