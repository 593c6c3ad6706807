"""From file, environment and flags to one frozen config, or to a list of every problem."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from rlhf.config.base import Section
from rlhf.config.commands import (
    COMMANDS,
    METHODS,
    Command,
    TrainConfig,
)
from rlhf.config.loading.flags import Flags
from rlhf.config.loading.layers import (
    VARIABLE,
    InCommand,
    InFlag,
    Layer,
    Setting,
    environment_layer,
    file_layer,
    flattened,
    python_layer,
    split_key,
)
from rlhf.config.loading.merge import Merged, Schema
from rlhf.config.loading.openrlhf import translate
from rlhf.config.loading.stray_words import is_file_name, refused
from rlhf.config.loading.yaml_text import scalar
from rlhf.config.problems import shown
from rlhf.config.rules.all_rules import problems_of
from rlhf.config.tools import GenerateConfig, QuickstartConfig
from rlhf.errors import ConfigError


def read_config(
    command: str, argv: Sequence[str], environ: Mapping[str, str], settings: Mapping[str, object] | None = None
) -> Merged[TrainConfig]:
    """Everything that was set for `rlhf train COMMAND`, with all problems of its values and between them.

    `settings` are values given from Python, by dotted key or nested; they override the others.

    Raises:
        ConfigError: there is no such command.
    """
    if command not in COMMANDS:
        raise ConfigError(f'train: unknown method "{command}" (have {", ".join(COMMANDS)}).')
    schema = Schema(COMMANDS[command].config)
    translation = translate(argv, schema.fields)
    flags = Flags(translation.argv, schema.fields, takes_file=True)
    flags.layer.problems += translation.problems
    flags.layer.wrong |= translation.spoiled
    others = list(flags.positionals)
    named = next((name for name in others if is_file_name(name)), None)
    files: list[Layer] = []
    if named is not None:
        others.remove(named)
        files = [file_layer(Path(named), environ, schema.fields)]
    strays = refused(others, flags, schema.fields)
    layers = [
        *files,
        strays,
        environment_layer(environ, schema.fields),
        flags.layer,
        python_layer(settings or {}, schema.fields),
    ]
    merged = Merged(schema, [*_member_layer(COMMANDS[command], layers), *layers], _sections_elsewhere(command))
    # Without the settings of its file, what a run lacks is not known.
    is_unread = any(file.problems and not file.settings for file in files) or (not files and strays.problems)
    if merged.config is not None and not is_unread:
        merged.problems += merged.report(problems_of(merged.config))
    return merged


def _member_layer(command: Command, layers: Sequence[Layer]) -> list[Layer]:
    """The setting that the name of a member stands for: its type. Settings of `layers` that name another member are
    refused."""
    if command.key is None:
        return []
    for layer in layers:
        for setting in [setting for setting in layer.settings if setting.key == command.key]:
            layer.settings.remove(setting)
            if setting.value != command.name:
                advice = f"Remove it, or run `rlhf train {command.method}`."
                text = f"{shown(setting.value)}, but the command trains {command.name}. {advice}"
                layer.refuse(setting.path, text, setting.origin)
    path = split_key(command.key)
    return [Layer([Setting(path, command.name, InCommand(command.name))])]


def _sections_elsewhere(command: str) -> dict[str, str]:
    """The sections that only other methods have, each with the message for a setting in it."""
    own = COMMANDS[command].config.model_fields
    owners: dict[str, list[str]] = {}
    for other, method in METHODS.items():
        for name in method.config.model_fields.keys() - own.keys():
            owners.setdefault(name, []).append(other)
    return {
        name: f"{command} has no {name}. Leave it out, or run {' or '.join(others)}." for name, others in owners.items()
    }


def load_config(command: str, argv: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> TrainConfig:
    """The resolved config of `rlhf train COMMAND ARGV`: defaults < file < environment < flags.

    `argv` is an optional config file and flags.

    Raises:
        ConfigError: with every problem, one line each.
    """
    merged = read_config(command, argv, os.environ if environ is None else environ)
    if merged.problems or merged.config is None:
        raise ConfigError(merged.problems)
    return merged.config.resolved()


def load_generate(argv: Sequence[str]) -> GenerateConfig:
    """The options of `rlhf generate MODEL ARGV`.

    Raises:
        ConfigError: with every problem, one line each.
    """
    schema = Schema(GenerateConfig)
    flags = Flags(argv, schema.fields)
    model = Layer([Setting(("model",), name, InFlag()) for name in flags.positionals[:1]])
    strays = refused(flags.positionals[1:], flags, schema.fields, "prompt")
    merged = Merged(schema, [model, strays, flags.layer])
    problems = [*merged.problems]
    config = merged.config
    if config is not None and config.model is None and not problems:
        problems.append("generate: name a model, a folder or a hub name.")
    if config is not None and not config.prompt and config.prompts is None and not problems:
        problems.append("generate: give --prompt TEXT, or --prompts FILE.")
    if config is not None and config.prompt and config.prompts is not None:
        problems.append("--prompts: --prompt is given too. Use one of them.")
    if problems or config is None:
        raise ConfigError(problems)
    return config


def load_quickstart(argv: Sequence[str]) -> QuickstartConfig:
    """The options of `rlhf quickstart ARGV`.

    Raises:
        ConfigError: with every problem, one line each.
    """
    flags = Flags(argv, (schema := Schema(QuickstartConfig)).fields)
    merged = Merged(schema, [refused(flags.positionals, flags, schema.fields), flags.layer])
    problems = merged.problems
    if problems or merged.config is None:
        raise ConfigError(problems)
    return merged.config


class _Dumper(yaml.SafeDumper):
    """Writes text so that it is read back as text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    written = VARIABLE.sub(r"$\g<0>", text)
    quote = '"' if scalar(text) != text or not text.isprintable() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", written, style=quote)


_Dumper.add_representer(str, _text)


def dump_config(config: Section) -> str:
    """The config as YAML that loads as the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def short_summary(config: Section) -> str:
    """What differs from the defaults, one line for each section."""
    defaults = dict(flattened(type(config)().model_dump(mode="json")))
    changed: dict[str, list[str]] = {}
    for path, value in flattened(config.model_dump(mode="json")):
        if path not in defaults or defaults[path] != value:
            section, *rest = (str(part) for part in path)
            changed.setdefault(section, []).append(
                f"{'.'.join(rest)}={value if isinstance(value, str) and value.isprintable() else json.dumps(value)}"
            )
    return "\n".join(f"{section}: {', '.join(values)}" for section, values in changed.items())
