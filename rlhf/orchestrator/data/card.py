"""The splits that a folder's README.md describes in its header, as on the hub: `configs`, each with `data_files`."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from rlhf.errors import DataError
from rlhf.types import Json

HEADER = re.compile(r"---[ \t]*\n(?P<yaml>.*?)\n---[ \t]*(\n|\Z)", re.DOTALL)
MAX_BYTES = 2**20
CARD = "README.md"


def described_files(folder: Path, subset: str | None = None) -> dict[str, list[Path]] | None:
    """The files of each split, in sorted order; None where the folder has no card that describes them. Of several sets
    of files, `subset` is the name of the one that is meant.

    Raises DataError where the card cannot be read, describes several sets of files, or files that are not there.
    """
    name = folder / CARD
    configs = _configs(name)
    if not configs and subset is None:
        return None
    given = _chosen(configs, name, subset).get("data_files")
    if given is None:
        return None
    splits: dict[str, list[Path]] = {}
    for split, pattern in _patterns(given, name):
        try:
            found = [file for file in folder.glob(pattern) if file.is_file()]
        except (ValueError, NotImplementedError) as error:
            raise DataError(f'data: {name} names the files "{pattern}", which is no pattern below it.') from error
        if not found:
            raise DataError(f'data: {name} names the files "{pattern}", which match none.')
        splits[split] = sorted({*splits.get(split, []), *found})
    return splits


def _configs(name: Path) -> list[Mapping[str, Json]]:
    """The sets of files that a card describes."""
    try:
        with name.open("rb") as stream:
            header = HEADER.match(stream.read(MAX_BYTES).decode(errors="replace").replace("\r\n", "\n"))
        content = yaml.safe_load(header["yaml"]) if header else None
    except FileNotFoundError:
        return []
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"data: the header of {name} cannot be read ({what}).") from error
    configs = content.get("configs") if isinstance(content, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _chosen(configs: list[Mapping[str, Json]], name: Path, subset: str | None) -> Mapping[str, Json]:
    """The set of files that is named, or the only one, or the one that is marked as the usual one."""
    if subset is not None:
        named = [config for config in configs if config.get("config_name") == subset]
        if len(named) != 1:
            have = ", ".join(str(config.get("config_name")) for config in configs) or "none"
            raise DataError(f'data.subset: {name} describes no set of files "{subset}" (have {have}).')
        return named[0]
    usual = [config for config in configs if config.get("default") is True or config.get("config_name") == "default"]
    if len(configs) > 1 and len(usual) != 1:
        names = ", ".join(str(config.get("config_name")) for config in configs)
        raise DataError(f"data: {name} describes several sets of files ({names}). Name one by data.subset.")
    return configs[0] if len(configs) == 1 else usual[0]


def _patterns(given: Json, name: Path) -> Iterator[tuple[str, str]]:
    """Split and pattern of each entry: text, a list of these, or a list of {split, path}."""
    for item in given if isinstance(given, list) else [given]:
        split, path = (item.get("split"), item.get("path")) if isinstance(item, dict) else ("train", item)
        for pattern in path if isinstance(path, list) else [path]:
            if not isinstance(split, str) or not isinstance(pattern, str):
                raise DataError(f"data: {name} describes data_files that are no text and no list of split and path.")
            yield split, pattern
