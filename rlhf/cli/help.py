"""Help texts, made from the config's own docstrings."""

import json
import shutil
import textwrap
from collections.abc import Iterator

from pydantic_core import PydanticUndefined

from rlhf.config.base import Section
from rlhf.config.commands import GenerateConfig, QuickstartConfig
from rlhf.config.fields import Field, fields_of, first_paragraph, sections_in
from rlhf.config.loading.flags import ALIASES
from rlhf.config.methods import METHODS
from rlhf.config.tools import ChaosConfig, PlanConfig

INDENT = 6


def groups(config: type[Section]) -> Iterator[tuple[str, str, list[Field]]]:
    """Name, description and fields of every section of a config."""
    fields = list(fields_of(config))
    for name, info in config.model_fields.items():
        section = sections_in(info.annotation)[0]
        yield name, first_paragraph(section), [field for field in fields if field.name.startswith(f"{name}.")]


def kind_of(field: Field) -> str:
    """What a field takes, for people."""
    if field.choices:
        return "|".join(str(choice) for choice in field.choices)
    if field.is_list:
        return "TEXT" if field.holds_text else "LIST"
    names = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return next((name for kind, name in names.items() if field.kind is kind), "VALUE")


def default_of(field: Field) -> str:
    """A field's default as YAML would have it; empty where there is none."""
    default = field.default
    if default is None or default is PydanticUndefined or default in ((), "", {}):
        return ""
    return default if isinstance(default, str) and default.isprintable() else json.dumps(default)


def bounds_and_variant(field: Field) -> str:
    """The numbers that are allowed, and the types that alone have the field."""
    facts = [field.bounds, f"only with type {' or '.join(field.owners)}" if len(field.owners) in range(1, 4) else ""]
    return "; ".join(fact for fact in facts if fact)


def facts_of(field: Field) -> str:
    """Default and limits, in brackets."""
    facts = [f"default {default_of(field)}" if default_of(field) else "", bounds_and_variant(field)]
    return f" [{'; '.join(fact for fact in facts if fact)}]" if any(facts) else ""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def field_help(field: Field, width: int) -> str:
    """A flag and its sentence."""
    short = next((alias for alias, name in ALIASES.items() if name == field.name), None)
    names = ", ".join(flag_of(name) for name in (field.name, short) if name)
    text = field.meaning + facts_of(field)
    body = textwrap.fill(text, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
    return f"  {names} {kind_of(field)}\n{body}\n"


def screen_width() -> int:
    return max(40, min(shutil.get_terminal_size((100, 24)).columns, 110))


def train_help(verb: str, command: str) -> str:
    """Help of `rlhf VERB COMMAND`: every flag by section."""
    config, width = METHODS[command].config, screen_width()
    parts = [TRAIN_HEAD.format(verb=verb, command=command, about=first_paragraph(config))]
    for name, about, fields in groups(config):
        heading = f"{name}: {about}"
        parts.append("\n".join([heading, "", *(field_help(field, width) for field in fields)]))
    return "\n".join(parts)


def plan_help() -> str:
    """Help of `rlhf plan`: its own flags; a run's are those of `rlhf train`."""
    return PLAN_HEAD.format(names=",".join(METHODS)) + "\n".join(
        field_help(field, screen_width()) for field in fields_of(PlanConfig)
    )


def chaos_help() -> str:
    """Help of `rlhf chaos`: its own flags; a run's are those of `rlhf train`."""
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
    """Help of `rlhf train` or `rlhf check` without an algorithm."""
    lines = [f"  {name:11} {method.summary}" for name, method in METHODS.items()]
    return COMMANDS_HEAD.format(verb=verb, names=",".join(METHODS)) + "\n".join(lines) + "\n"


COMMANDS_HEAD = """\
Usage: rlhf {verb} {{{names}}} [CONFIG.yaml] [--section.key value ...]

"""
TRAIN_HEAD = """\
Usage: rlhf {verb} {command} [CONFIG.yaml] [--section.key value ...]

{about}

Defaults < CONFIG.yaml < environment (RLHF__SECTION__KEY=value) < flags. Also --section.key=value, --set
section.key=value, --section.key and --no-section.key for true and false; a list's flag may be repeated. Flags of
OpenRLHF are read too, and --openrlhf takes those as its own that are spelled like flags here.
"""
PLAN_HEAD = """\
Usage: rlhf plan {{{names}}} [CONFIG.yaml] [--section.key value ...] [options]

Shows where a run's models would live, what each device would hold phase by phase and how long a step would take,
before anything starts; of models it reads config.json alone. Takes every flag of `rlhf train METHOD` too. Exits with
2 where the run does not fit, and says with which settings it would.

`rlhf plan --calibrate RUN [--cluster 2x8xH100]` shows what a finished run measured beside what was planned for it, and
keeps the factors for --calibration.

"""
CHAOS_HEAD = """\
Usage: rlhf chaos {{{names}}} [CONFIG.yaml] [--section.key value ...] [options]

Runs a config twice, in peace and under faults: processes of one kind after another are killed or stopped, each in
another phase of a step, and the newest checkpoint is damaged. Both runs must end with the same weights (on CPU, where
rollouts do not run ahead). Takes every flag of `rlhf train METHOD` too. For --kinds stop, lower the deadlines first:
train.step_timeout_s and rollout.generate_timeout_s.

"""
GENERATE_HEAD = """\
Usage: rlhf generate MODEL [--prompt TEXT ... | --prompts FILE] [options]

Samples answers from a trained model, a folder or hub name.

"""
QUICKSTART_HEAD = """\
Usage: rlhf quickstart [options]

The three steps of RLHF (sft, rm, ppo) on a tiny model of its own, in minutes, with a table of what was learned.

"""
