"""Which files a path means: a file, a glob, or a folder, whose files and folders may be named for splits.

Names are read like those of `datasets`: what the folder's card says, else data/NAME-00000-of-00003.parquet, else
folders named for a split, else files named for one; all rows are `train` where no name says otherwise.
"""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.data import MAX_ROW_BYTES, DataSection
from rlhf.errors import DataError
from rlhf.orchestrator.data.card import described_files
from rlhf.orchestrator.data.files import Source, kind_of
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.readers import READERS

TRAIN = "train"
ALL = "all"
"""What data.split says to read every split."""
KEYWORDS = {
    "train": TRAIN, "training": TRAIN,
    "validation": "validation", "valid": "validation", "dev": "validation", "val": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""What a file or folder may be called that holds a split, and the name of the split."""
SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5})")
SEPARATORS = re.compile(r"[-._ 0-9/]+")
HELD_OUT = re.compile(
    r"(?:^|[-._ 0-9/])(?:test|valid|validation|eval|dev|h[eo]ld[-_ ]?out)(?:set|data|split|rows|s)?(?:$|[-._ 0-9/])",
    re.IGNORECASE,
)
"""Words of a file's name that are no split's name, and may mean held-out rows."""
NO_ROWS = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
UNREADABLE = {
    ".arrow",
    ".avro",
    ".bz2",
    ".lz4",
    ".ndjson",
    ".orc",
    ".tar",
    ".tsv",
    ".txt",
    ".xlsx",
    ".xz",
    ".zip",
    ".zst",
}
"""Files in a folder that may hold rows and cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The split to read: the first of `names` that is there. `key` is the setting that says so. `subset` is the
    configuration of the data set, where it has several."""

    names: tuple[str, ...]
    key: str
    subset: str | None = None

    def choose(self, have: Sequence[str], where: str) -> str:
        """The split to read of those that `where` has, or ALL. Raises DataError."""
        for name in self.names:
            if name in have or name == ALL:
                return name
            if KEYWORDS.get(name) in have:
                return KEYWORDS[name]
        raise DataError(f'{self.key}: {where} has no split "{self.names[0]}" (have {", ".join(have)}).')


def training_split(section: DataSection) -> Wanted:
    """The split of data.path."""
    return Wanted(names=(section.split,), key="data.split", subset=section.subset)


def held_out_split(section: DataSection) -> Wanted:
    """The split of data.eval_path."""
    names = ("validation", "test", TRAIN) if section.eval_split is None else (section.eval_split,)
    return Wanted(names=names, key="data.eval_split", subset=section.subset)


def find_files(pattern: str, wanted: Wanted, problems: Problems, max_row_bytes: int = MAX_ROW_BYTES) -> list[Source]:
    """The files that a path or glob names, in sorted order; of a folder of splits, those of the one that is wanted.
    What is left out is noted in `problems`. Raises DataError where none matches, or a split is not there or not whole.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = _files_in(path, problems)
        splits = described_files(path, wanted.subset) or split_files(files, path)
        found = _of_split(files, splits, path, wanted, problems)
    elif wanted.subset is not None:
        raise DataError(f"data.subset: {pattern} is neither a hub data set nor a folder. Remove it.")
    elif path.is_file():
        wanted.choose(list(dict.fromkeys([TRAIN, *_split_of_name(path.name)])), pattern)
        found = [path]
    else:
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 the pattern may be absolute
        found = sorted(Path(name) for name in names if Path(name).is_file())
        splits = split_files(found, _fixed_part(path))
        if len(splits) > 1:
            found = _of_split(found, splits, path, wanted, problems)
    if not found:
        raise DataError(f"data: {pattern} matches no file.{_meant(pattern)}")
    unknown = [file for file in found if kind_of(file) not in READERS]
    if unknown:
        known = ", ".join(READERS)
        raise DataError([f"{file}: unknown kind of file (have {known}, each also with .gz)." for file in unknown])
    unique = len({file.name for file in found}) == len(found)
    return [Source(path=file, label=file.name if unique else str(file), max_row_bytes=max_row_bytes) for file in found]


def split_files(files: Sequence[Path], folder: Path) -> dict[str, list[Path]]:
    """The files of each split that names below `folder` speak of; empty where none does. Files that are named for no
    split are in none."""
    for splits_of in (_split_of_shard, _split_of_folders, _split_of_name):
        found: dict[str, list[Path]] = {}
        for file in files:
            for split in splits_of(file.relative_to(folder).as_posix()):
                found.setdefault(split, []).append(file)
        if found:
            return found
    return {}


def _of_split(
    files: Sequence[Path], splits: Mapping[str, list[Path]], path: Path, wanted: Wanted, problems: Problems
) -> list[Path]:
    """The files of the split that is wanted; of `path`, a folder or a glob."""
    if not files:
        return []
    folder = path if path.is_dir() else _fixed_part(path)
    _require_whole(splits or {TRAIN: list(files)}, folder)
    if not splits:
        wanted.choose([TRAIN], str(path))
        if doubtful := [file for file in files if HELD_OUT.search(file.relative_to(folder).as_posix())]:
            problems.note(
                f"{_names(doubtful, folder)} in {path} may hold test rows by the name, and is read as training rows; "
                "name the files to read in data.path."
            )
        return list(files)
    split = wanted.choose(list(splits), str(path))
    read = list(splits) if split == ALL else [split]
    chosen = sorted({file for name in read for file in splits[name]})
    not_chosen = {file for name in splits if name not in read for file in splits[name]}
    if both := [file for file in chosen if file in not_chosen]:
        raise DataError(f"data: {both[0]} is named for more than one split. Name the files in data.path.")
    left = [f"{name} ({_names(others, folder)})" for name, others in splits.items() if name not in read]
    in_none = sorted({*files} - {*chosen} - not_chosen)
    left += [f"{_names(in_none, folder)} (of no split)"] if in_none else []
    if left:
        what = "every split" if split == ALL else f"the split {split}"
        problems.note(f"of {path}, {what} is read ({_names(chosen, folder)}); not {', '.join(left)}.")
    return chosen


def _meant(pattern: str) -> str:
    """What to do where a path that matches nothing is one that other tools read."""
    if "://" in pattern:
        return " Addresses are not read; download the file, or name a hub data set as owner/name."
    if "," in pattern or "{" in pattern:
        return " Lists and braces are not read; name one folder, or a glob of *, ? and [...] in quotes."
    return ""


def _files_in(folder: Path, problems: Problems) -> list[Path]:
    """Every data file in a folder and the folders inside it, in sorted order, but for hidden ones."""
    seen = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(folder)))
    files = [file for file in seen if kind_of(file) in READERS and file.name not in NO_ROWS]
    if unread := [file for file in seen if file.suffix.lower() in UNREADABLE]:
        problems.note(
            f"{_names(unread, folder)} in {folder}: this kind of file is not read (have {', '.join(READERS)})."
        )
    return files


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or any(part.startswith((".", "__")) for part in path.parent.parts)


def _split_of_shard(name: str) -> list[str]:
    """data/NAME-00000-of-00003.parquet is of the split NAME, whatever it is called."""
    folder, _, file = name.rpartition("/")
    shard = SHARD.match(file)
    return [shard["split"]] if folder == "data" and shard else []


def _split_of_folders(name: str) -> list[str]:
    return _spoken_of(name.rpartition("/")[0])


def _split_of_name(name: str) -> list[str]:
    """The words of a file's name but for its endings: my-test.v2.jsonl is of the split test."""
    file = name.rpartition("/")[2].removesuffix(".gz")
    return _spoken_of(file.rpartition(".")[0])


def _spoken_of(text: str) -> list[str]:
    """The splits that the words of a name speak of, each once."""
    return list(dict.fromkeys(KEYWORDS[word] for word in SEPARATORS.split(text) if word in KEYWORDS))


def _require_whole(splits: Mapping[str, Sequence[Path]], folder: Path) -> None:
    """Raise DataError where files are numbered (-00000-of-00003) and one is missing."""
    problems = []
    for files in splits.values():
        numbers: dict[tuple[Path, str, str, str], set[int]] = {}
        for file in files:
            if shard := SHARD.match(file.name):
                key = (file.parent, shard["split"], shard["total"], file.name[shard.end() :])
                numbers.setdefault(key, set()).add(int(shard["number"]))
        for (parent, name, total, ending), there in numbers.items():
            missing = sorted(set(range(int(total))) - there)
            if missing:
                first = (parent / f"{name}-{missing[0]:05}-of-{total}{ending}").relative_to(folder)
                problems.append(f"data: {folder} holds {len(there)} of {int(total)} files of {name} (no {first}).")
    if problems:
        raise DataError(problems)


def _names(files: Sequence[Path], folder: Path) -> str:
    shown = [str(file.relative_to(folder)) for file in files[:3]]
    return ", ".join(shown) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _fixed_part(pattern: Path) -> Path:
    """The folders of a glob before its first wildcard."""
    parts = pattern.parts[:-1]
    magic = [index for index, part in enumerate(parts) if glob.has_magic(part)]
    return Path(*parts[: magic[0]]) if magic else pattern.parent
