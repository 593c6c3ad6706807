"""Help of `rlhf train METHOD`: first the settings that people change, then each section, a search, or everything."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlhf.cli.help import default_of, field_help, flag_of, kind_of, screen_width
from rlhf.config.base import Section
from rlhf.config.commands import COMMANDS, Command, TrainConfig
from rlhf.config.fields import Field, fields_by_name, fields_of, first_paragraph
from rlhf.config.loading.flags import Flags
from rlhf.config.loading.layers import InFlag, Layer, Setting, file_layer, split_key
from rlhf.config.loading.merge import Merged, Schema
from rlhf.config.loading.openrlhf import translate
from rlhf.errors import ConfigError

OFTEN_CHANGED = (
    "policy.model", "reward.model", "data.path", "data.prompt_format", "reward.function", "reward.rules",
    "rollout.batch_size", "rollout.group_size", "rollout.max_prompt_tokens", "rollout.max_response_tokens",
    "rollout.temperature", "data.max_tokens", "train.batch_size", "train.num_steps", "train.num_epochs", "policy.lr",
    "reward.lr", "critic.lr", "policy.lora.rank", "reward.lora.rank", "algo.type", "algo.loss.type", "algo.loss.beta",
    "algo.beta", "algo.kl.coef", "algo.clip_high", "policy.num_gpus_per_node", "cluster.colocate", "eval.every_steps",
    "checkpoint.every_steps", "checkpoint.resume", "run.name",
)  # fmt: skip
"""The settings that people change, where a command has them, in the order in which a run is thought out."""
ALL = "all"
WIDEST_FLAG = 34


def train_help(verb: str, name: str, words: Sequence[str] = ()) -> str:
    """Help of `rlhf VERB NAME WORDS`. A word after `--help` is a section, a word to search for, or `all`. Defaults are
    those of the algorithm that the other words choose.

    Raises:
        ConfigError: nothing is about that word.
    """
    topic, argv = _topic(words)
    command = _chosen(COMMANDS[name], argv)
    sections = list(groups(command, member_defaults(command)))
    if topic is None:
        return _overview(verb, command, sections)
    if topic == ALL:
        return _head(verb, command) + "\n".join(["", *(_section(*section) for section in sections)])
    key = topic.lstrip("-").replace("-", "_").rstrip(".")
    fields = [field for _, _, inside in sections for field in inside]
    if own := [section for section in sections if section[0] == key]:
        return _section(*own[0])
    if inside := [field for field in fields if field.name == key or field.name.startswith(f"{key}.")]:
        return _listed(inside)
    word = topic.lower()
    found = [field for field in fields if word in flag_of(field.name) or word in field.meaning.lower()]
    if not found:
        have = ", ".join(section for section, _, _ in sections)
        raise ConfigError(f'--help: no section and no setting is about "{topic}" (sections: {have}; or all).')
    return _listed(sorted(found, key=lambda field: (key not in field.name, word not in flag_of(field.name))))


def member_defaults(command: Command) -> TrainConfig:
    """The config of a command with only the type of its member set."""
    layer = Layer()
    if command.key is not None:
        layer.settings.append(Setting(split_key(command.key), command.name, InFlag()))
    config = Merged(Schema(command.config), [layer]).config
    assert config is not None, "defaults are valid"
    return config


def member_section(command: Command, defaults: TrainConfig) -> str:
    """The first paragraph of a member's docstring."""
    section: Section = defaults
    for part in split_key(command.key or "")[:-1]:
        section = dict(section)[part]
    return first_paragraph(type(section))


def groups(command: Command, defaults: TrainConfig) -> Iterator[tuple[str, str, list[Field]]]:
    """Name, description and fields of every section of a config; of a member, only the fields that it has."""
    config = command.config
    fields = [field for field in fields_of(config, values=defaults) if _has(command, field)]
    for name in config.model_fields:
        section = type(dict(defaults)[name])
        yield name, first_paragraph(section), [field for field in fields if field.name.startswith(f"{name}.")]


def _has(command: Command, field: Field) -> bool:
    """Whether a field can be set in a command: not the one that its name decides, nor those that only other members
    have."""
    if command.key is None or field.name == command.key:
        return command.key is None
    is_sibling = field.name.startswith(f"{command.key.rpartition('.')[0]}.")
    return not is_sibling or not field.owners or command.name in field.owners


def _topic(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The word after `--help`, and the words without both."""
    rest = list(words)
    place = next((i for i, word in enumerate(rest) if word in ("-h", "--help")), None)
    if place is None:
        return None, rest
    after = rest[place + 1 : place + 2]
    is_topic = bool(after) and not after[0].startswith("-") and not after[0].endswith((".yaml", ".yml"))
    return (after[0] if is_topic else None), [*rest[:place], *rest[place + 1 + is_topic :]]


def _chosen(command: Command, argv: Sequence[str]) -> Command:
    """The member of a method that flags or a config file choose, as `--algo dapo`; the command itself else."""
    fields = fields_by_name(command.config)
    flags = Flags(translate(argv, fields).argv, fields)
    files = [file_layer(Path(word), {}, fields) for word in flags.positionals if word.endswith((".yaml", ".yml"))]
    given = {setting.key: setting.value for layer in (*files, flags.layer) for setting in layer.settings}
    members = (other for other in COMMANDS.values() if other.method == command.method and other.key is not None)
    return next((other for other in members if given.get(other.key or "") == other.name), command)


def _head(verb: str, command: Command) -> str:
    about = first_paragraph(command.config)
    if command.key is not None:
        about = f"{member_section(command, member_defaults(command))} A member of {command.method}: "
        about += f"--{command.key} {command.name}."
    return TRAIN_HEAD.format(
        verb=verb, command=command.name, about=textwrap.fill(about, screen_width(), break_on_hyphens=False)
    )


def _overview(verb: str, command: Command, sections: Sequence[tuple[str, str, list[Field]]]) -> str:
    """The settings that people change, and the sections, one line each."""
    fields: Mapping[str, Field] = {field.name: field for _, _, inside in sections for field in inside}
    lines = ["Settings that people change:"]
    lines += [_in_a_line(fields[name]) for name in OFTEN_CHANGED if name in fields]
    lines += ["", f"Sections of {len(fields)} settings in all:"]
    for name, meaning, inside in sections:
        lines.append(_cut(f"  {name:<11}{len(inside):>4}  {meaning}"))
    return f"{_head(verb, command)}\n" + "\n".join(lines) + TRAIN_FOOT.format(verb=verb, command=command.name)


def _in_a_line(field: Field) -> str:
    """A flag, its kind, default and the first sentence of its help, in one line."""
    flag = f"{flag_of(field.name)} {kind_of(field)}"
    if len(flag) > WIDEST_FLAG:
        flag = flag_of(field.name)
    default = f"[{default_of(field)}] " if default_of(field) else ""
    first_sentence = re.split(r"\.(?= [A-Z])", field.meaning)[0].rstrip(".")
    meaning = ", ".join(field.variants) or first_sentence
    return _cut(f"  {flag:<{WIDEST_FLAG}}  {default}{meaning}")


def _cut(line: str) -> str:
    width = screen_width()
    return line if len(line) <= width else f"{line[: width - 4].rstrip(' ,;:')} ..."


def _section(name: str, meaning: str, fields: Sequence[Field]) -> str:
    return "\n".join([f"{name}: {meaning}", "", *(field_help(field, screen_width()) for field in fields)])


def _listed(fields: Sequence[Field]) -> str:
    return "\n".join(field_help(field, screen_width()) for field in fields)


TRAIN_HEAD = """\
Usage: rlhf {verb} {command} [CONFIG.yaml] [--section.key value ...]

{about}

Defaults < CONFIG.yaml < environment (RLHF__SECTION__KEY=value) < flags. Also --section.key=value, --set
section.key=value, --section.key and --no-section.key for true and false; a list's flag may be repeated. Flags of
OpenRLHF are read too, and --openrlhf takes those as its own that are spelled like flags here.
"""
TRAIN_FOOT = """

  rlhf {verb} {command} --help SECTION    every setting of a section, as `--help policy`
  rlhf {verb} {command} --help WORD       the settings about a word, as `--help clip`
  rlhf {verb} {command} --help all        every setting
"""
