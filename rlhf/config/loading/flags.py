"""The command line: `--section.key value`, `--section.key=value`, `--no-section.key`, `--set section.key=value`."""

from collections.abc import Mapping, Sequence

from rlhf.config.fields import Field
from rlhf.config.loading.layers import SWITCH_WORDS, InFlag, Layer, Setting, dotted, split_key
from rlhf.config.loading.yaml_text import KeyPath
from rlhf.config.repeated import ONE_PATH, warn_repeated

ALIASES = {
    "algo": "algo.type",
    "loss": "algo.loss.type",
    "colocate": "cluster.colocate",
    "resume": "checkpoint.resume",
    "run_name": "run.name",
    "debug": "cluster.debug",
    "json": "as_json",
}
"""Short names of frequently used flags."""
CONFIG_FLAGS = ("-c", "--config", "--config-file", "--config_file")
"""How other systems name a config file, which is an argument here."""


class Flags:
    """A parsed command line: a layer of settings, and the arguments that belong to no flag."""

    def __init__(self, argv: Sequence[str], fields: Mapping[str, Field], *, takes_file: bool = False) -> None:
        """`takes_file`: whether a config file may be among the arguments."""
        self.layer = Layer()
        self.positionals: list[str] = []
        self.after_switch: dict[str, Field] = {}
        """Arguments that follow a switch and are none of its values, each with the switch."""
        self._fields = fields
        self.takes_file = takes_file
        waiting = list(reversed(argv))
        while waiting:
            word = waiting.pop()
            if self.takes_file and word.partition("=")[0] in CONFIG_FLAGS and self._field(word.lstrip("-")) is None:
                self._config_file(word, waiting)
            elif not word.startswith("--"):
                self.positionals.append(word)
            elif word == "--set":
                self._assignment(waiting.pop() if waiting else "")
            else:
                self._flag(word, waiting)
        self.layer.settings = self._joined_lists()

    def _assignment(self, text: str) -> None:
        key, equals, value = text.partition("=")
        if equals and key:
            self._set(key, value)
        else:
            self.layer.problems.append(f'--set: need key=value (got "{text}").')

    def _config_file(self, word: str, waiting: list[str]) -> None:
        """Read the file of `--config FILE` too, so that what it sets is not asked for."""
        name, equals, file = word.partition("=")
        if not equals and waiting and not waiting[-1].startswith("-"):
            file = waiting.pop()
        self.layer.problems.append(f"{name}: a config file is named without a flag. Write {file or 'FILE.yaml'} alone.")
        self.positionals += [file] if file else []

    def _flag(self, word: str, waiting: list[str]) -> None:
        """Read one flag, and its value from `waiting` if it has one there."""
        name, equals, text = word.removeprefix("--").partition("=")
        known = self._field(name)
        negated = self._field(name.removeprefix("no-")) if name.startswith("no-") and not equals else None
        if equals:
            self._set(name, text)
        elif known is None and negated is not None and negated.is_switch:
            self._set(name.removeprefix("no-"), "false")
        elif known is not None and known.is_switch:
            values = {*SWITCH_WORDS, *known.words}
            is_given = bool(waiting) and waiting[-1].lower() in values
            if waiting and not is_given:
                self.after_switch[waiting[-1]] = known
            self._set(name, waiting.pop() if is_given else "true")
        elif waiting and not waiting[-1].startswith("--"):
            self._set(name, waiting.pop())
        elif known is None:
            self._set(name, "")
        else:
            self.layer.refuse(self._path(name), "needs a value.", InFlag())

    def _path(self, name: str) -> KeyPath:
        key = name.replace("-", "_")
        path = split_key(ALIASES.get(key, key) if ALIASES.get(key) in self._fields else key)
        return self.layer.current(path, InFlag(), self._fields)

    def _field(self, name: str) -> Field | None:
        return self._fields.get(dotted(self._path(name)))

    def _set(self, name: str, text: str) -> None:
        self.layer.set_text(self._path(name), text, InFlag(), self._field(name))

    def _joined_lists(self) -> list[Setting]:
        """The settings, with the values of a list's repeated flags in one list."""
        joined: dict[KeyPath, Setting] = {}
        for setting in self.layer.settings:
            before = joined[setting.path].value if setting.path in joined else None
            if setting.key in ONE_PATH and before not in (None, setting.value):
                warn_repeated(setting.origin.where(setting.path), before, setting.value)
            match before, setting.value:
                case list(), list():
                    joined[setting.path] = Setting(setting.path, [*before, *setting.value], setting.origin)
                case _:
                    joined[setting.path] = setting
        return list(joined.values())
