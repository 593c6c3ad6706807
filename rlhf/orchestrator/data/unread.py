"""What no one reads of a data set: columns, and keys of messages. Rows may hold more than is used, never unsaid."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf.conversations.messages import READ_KEYS
from rlhf.orchestrator.data.columns import Columns
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.records import TOOLS, Record
from rlhf.types import Json

READ_PART_KEYS = frozenset({"type", "text"})
"""Keys of a part, where a message's content is a list of parts."""
MAX_NAMES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """Names of columns that nothing reads; of these, `metadata` go with the prompt to where rewards are computed.
    `keys` are those of messages, with their column."""

    columns: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    def lines(self, rewards_read: Collection[str] | None) -> list[str]:
        """One line for the columns and one for the keys. `rewards_read` are the columns that the reward sources read;
        None where these are not known."""
        known = rewards_read or ()
        only = [
            name
            for name in self.columns
            if name not in known and (rewards_read is not None or name not in self.metadata)
        ]
        open_ones = self.metadata if rewards_read is None else ()
        found = (
            ("columns that nothing read", only),
            ("columns that nothing read, unless a reward or environment does", open_ones),
            ("keys of messages that nothing read", self.keys),
        )
        return [f"{what}: {_listed(names)}." for what, names in found if names]


NONE_UNREAD = Unread()


def find_unread(
    rows: Sequence[Row], records: Sequence[Record], columns: Columns, reads: Collection[str | None], to_rewards: bool
) -> Unread:
    """What nothing reads of `rows`. `reads` are the columns that mean something besides those of the records' prompts
    and responses; `to_rewards` says that the other columns go to reward sources."""
    tools = {TOOLS} if any(record.tools and not isinstance(record.prompt, str) for record in records) else set()
    read = {*reads, *tools, *(name.partition("[")[0] for record in records for name in record.names)}
    there = dict.fromkeys(name for row in rows for name, value in row.values.items() if not _is_empty(value))
    unread = [name for name in there if name not in read] if records else []
    texts = [name for name in there if name in read and name in {*columns.texts, columns.response}]
    keys = dict.fromkeys(key for row in rows for name in texts for key in _unread_keys(row.values, name))
    metadata = [name for name in unread if to_rewards and name not in columns.texts and name != "messages"]
    return Unread(columns=tuple(unread), metadata=tuple(metadata), keys=tuple(keys))


def _unread_keys(values: Mapping[str, Json], name: str) -> Iterator[str]:
    for message in _objects_of(values.get(name)):
        yield from (f"{name}[].{key}" for key in _other_keys(message, READ_KEYS))
        for part in _objects_of(message.get("content")):
            yield from (f"{name}[].content[].{key}" for key in _other_keys(part, READ_PART_KEYS))


def _objects_of(value: Json) -> Iterator[Mapping[str, Json]]:
    """The objects of a list, and of lists in it (a ranking of conversations)."""
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict):
            yield item
        else:
            yield from _objects_of(item)


def _other_keys(item: Mapping[str, Json], known: Collection[str]) -> Iterable[str]:
    return (key for key, value in item.items() if key not in known and not _is_empty(value))


def _is_empty(value: Json) -> bool:
    """Whether a value says nothing: tables fill what a row does not have with such."""
    return value is None or value in ("", [], {})


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(name or '""' for name in names[:MAX_NAMES]) + more
