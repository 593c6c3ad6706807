"""Sampled responses on disk: one row each, written chunk by chunk. An interrupted command continues where it stopped,
and the file ends up with the same bytes as after an uninterrupted one."""

import fcntl
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Self

from rlhf.config.data import DataSection
from rlhf.episode import EpisodeRollout
from rlhf.errors import ConfigError
from rlhf.orchestrator.data.curation import Row, Sample
from rlhf.orchestrator.data.dialogue import parse_messages, parse_text
from rlhf.orchestrator.data.layout import training_split
from rlhf.orchestrator.data.problems import Problems, RowError
from rlhf.orchestrator.data.records import TOOLS
from rlhf.orchestrator.data.sources import read_rows
from rlhf.orchestrator.data.values import canonical_text, is_float, shown
from rlhf.orchestrator.run.files import checkpoint_errors, sync_path, write_json
from rlhf.orchestrator.run.responses import episode_values
from rlhf.orchestrator.step.sampler import request_seed
from rlhf.terminal import counted
from rlhf.types import FinishReason, Json, Prompt, Reward, Rollout, RolloutRequest, Sampling

logger = logging.getLogger(__name__)

SETTINGS_SUFFIX = ".settings"
"""What a samples file was made with lies beside it under this suffix, which no reader takes for rows."""
NUM_ANSWERS = "num_answers"
"""The setting that says how many rows a finished file has; it follows from the others."""
NEEDS_SOURCE = "Give `rlhf sample` a reward source."
DIGEST = re.compile(r"[0-9a-f]{64}")


def make_requests(prompts: Sequence[Prompt], group_size: int, seed: int, sampling: Sampling) -> list[RolloutRequest]:
    """`group_size` requests a prompt. A response depends on the seed, its prompt's id and its number alone."""
    return [
        RolloutRequest(
            id=f"{prompt.id}/{number}",
            prompt_id=prompt.id,
            prompt_token_ids=prompt.token_ids,
            seed=request_seed(seed, prompt.id, number),
            sampling=sampling,
        )
        for prompt in prompts
        for number in range(group_size)
    ]


def sample_row(
    prompt: Prompt,
    request: RolloutRequest,
    rollout: Rollout,
    response: str,
    reward: Reward | None,
    model: str,
    tools: Sequence[Json] = (),
) -> Row:
    """A response and where it came from. The prompt is written as the model saw it: the text with data.prompt_format,
    or the messages that the chat template rendered with `tools`. One of several turns has them under `episode`."""
    metadata = dict(prompt.metadata)
    messages = metadata.pop("messages", None)
    own_tools = metadata.pop(TOOLS, None) if messages is not None else None
    offered = list(tools) or own_tools
    return {
        "id": request.id,
        "prompt": prompt.text if messages is None else messages,
        "response": response,
        "reward": reward.total if reward is not None and reward.is_scored else None,
        "parts": {} if reward is None else dict(reward.parts),
        "num_tokens": len(rollout.token_ids),
        "finish_reason": rollout.finish_reason.value,
        "seed": request.seed,
        "model": model,
        "label": prompt.label,
        "metadata": metadata,
        **({} if offered is None else {TOOLS: offered}),
        **({"episode": episode_values(rollout.episode)} if isinstance(rollout, EpisodeRollout) else {}),
    }


class SampleFile:
    """A .jsonl file that grows by whole chunks. Use `open`; `num_chunks` of them are there already.

    Every chunk is on the disk before the next one begins. What a crash tore is cut away when the file is opened again.
    """

    def __init__(self, path: Path, file: BinaryIO, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self._path = path
        self._file = file

    @classmethod
    @contextmanager
    def open(cls, path: Path, settings: Mapping[str, Json], chunks: Sequence[Sequence[str]]) -> Iterator[Self]:
        """Begin a file, or take hold of one with the same `settings`. `chunks` are the ids of the rows to come.

        Raises ConfigError where the file was made with other settings or is not ours, CheckpointError where the disk
        refuses.
        """
        with checkpoint_errors(path):
            file, num_chunks = _prepare(path, settings, chunks)
        try:
            yield cls(path, file, num_chunks)
        finally:
            file.close()

    def append(self, rows: Sequence[Row]) -> None:
        """Add a chunk."""
        with checkpoint_errors(self._path):
            self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.num_chunks += 1


def settings_of(path: Path) -> Path:
    """Where the settings of a samples file lie."""
    return path.with_name(path.name + SETTINGS_SUFFIX)


def is_finished(path: Path) -> bool:
    """Whether a samples file holds every response that its settings ask for."""
    try:
        num_answers = json.loads(settings_of(path).read_text(encoding="utf-8"))[NUM_ANSWERS]
        with path.open("rb") as file:
            return bool(sum(line.endswith(b"\n") for line in file) == num_answers)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _prepare(path: Path, settings: Mapping[str, Json], chunks: Sequence[Sequence[str]]) -> tuple[BinaryIO, int]:
    """The file, held and cut to whole chunks, and their number."""
    beside = settings_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > 0 and not beside.exists():
        raise ConfigError(f"--out: {path} exists and holds no samples of ours. Choose another.")
    file = path.open("ab+")
    try:
        _hold(path, file)
        if beside.exists() and path.stat().st_size > 0:
            _require_same(path, _read_settings(beside), settings)
        else:
            write_json(beside, settings)
        num_chunks, size = _whole_chunks(path, file, chunks)
        file.truncate(size)
        sync_path(path.parent)
    except BaseException:
        file.close()
        raise
    return file, num_chunks


def _hold(path: Path, file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"--out: {path} is being written by another command. Wait for it, or choose another."
        ) from error


def _read_settings(beside: Path) -> dict[str, Json]:
    try:
        settings = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--out: {beside} is damaged ({error}). Choose another --out.") from error
    return settings if isinstance(settings, dict) else {}


def _require_same(path: Path, before: Mapping[str, Json], now: Mapping[str, Json]) -> None:
    changed = [key for key in {**before, **now} if key != NUM_ANSWERS and before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            [
                f"--out: {path} was made with {_difference(key, before.get(key), now.get(key))}. "
                "Choose another file, or the same settings."
                for key in changed
            ]
        )


def _difference(key: str, before: Json, now: Json) -> str:
    """What changed, in words; a digest says nothing to a reader."""
    if all(isinstance(value, str) and DIGEST.fullmatch(value) for value in (before, now)):
        return f"other {key}"
    return f"{key} {json.dumps(before)}, now {json.dumps(now)}"


def _whole_chunks(path: Path, file: BinaryIO, chunks: Sequence[Sequence[str]]) -> tuple[int, int]:
    """How many chunks are there, and how many bytes they take. Raises ConfigError where a row is not the expected."""
    file.seek(0)
    size = 0
    line_number = 0
    for number, ids in enumerate(chunks):
        chunk_size = 0
        for expected in ids:
            line = file.readline()
            line_number += 1
            found = _id_of(line)
            if found is None:
                return number, size
            if found != expected:
                raise ConfigError(f'--out: {path}:{line_number} is "{found}", not "{expected}": the file was changed.')
            chunk_size += len(line)
        size += chunk_size
    if file.read(1):
        raise ConfigError(f"--out: {path} holds more than {line_number} rows: the file was changed.")
    return len(chunks), size


def _id_of(line: bytes) -> str | None:
    """The id of a whole row; None where a crash tore it."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return str(row["id"]) if isinstance(row, dict) and "id" in row else None


def read_samples(path: str) -> list[Sample]:
    """The scored responses in a file or glob: rows with `prompt`, `response` and `reward` (null where its source gave
    none). Raises DataError with every row that is not one, and where no response has a reward."""
    problems = Problems(0)
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for row in read_rows(path, training_split(DataSection()), problems):
        try:
            sample = _sample(row.values, row.where)
        except RowError as error:
            problems.add_row(row.file, row.where, str(error))
            continue
        seen[sample.id] = seen.get(sample.id, 0) + 1
        samples.append(sample if seen[sample.id] == 1 else _renamed(sample, seen[sample.id]))
    if samples and not any(sample.is_scored for sample in samples):
        problems.add(f"{path}: none of {counted(len(samples), 'response')} has a reward. {NEEDS_SOURCE}")
    problems.settle()
    for note in problems.notes:
        logger.warning("%s", note)
    return samples


def _sample(values: Mapping[str, Json], where: str) -> Sample:
    prompt, response, reward = values.get("prompt"), values.get("response"), values.get("reward")
    if isinstance(prompt, list):
        parse_messages(prompt, "prompt")
    else:
        parse_text(prompt, "prompt")
    if not isinstance(response, str):
        raise RowError(f"response is not text (got {type(response).__name__}).")
    if reward is None and "reward" in values:
        reward = math.nan
    elif isinstance(reward, bool) or not isinstance(reward, int | float) or not is_float(reward):
        raise RowError(f"reward is not a number (got {shown(reward)}). {NEEDS_SOURCE}")
    begun, turns = _turns(prompt, values.get("episode"))
    return Sample(
        id=canonical_text(values.get("id")) or where,
        prompt=begun,
        response=response,
        turns=turns,
        reward=float(reward),
        truncated=values.get("finish_reason") in (FinishReason.LENGTH.value, FinishReason.ABORTED.value),
        row=values,
    )


def _turns(prompt: Json, episode: Json) -> tuple[Json, list[Json]]:
    """A prompt with what an environment said before the model's first turn, and the messages from that turn on; none
    for a response that is one text. Raises RowError."""
    messages = episode.get("messages") if isinstance(episode, dict) else None
    if not isinstance(messages, list) or not isinstance(prompt, list):
        return prompt, []
    roles = [message.role for message in parse_messages(messages, "episode.messages")]
    if roles == ["assistant"] or "assistant" not in roles:
        return prompt, []
    first, last = roles.index("assistant"), len(roles) - roles[::-1].index("assistant")
    return [*prompt, *messages[:first]], messages[first:last]


def _renamed(sample: Sample, count: int) -> Sample:
    """Samples of several files may have the same ids; rows of a data set may not."""
    return replace(sample, id=f"{sample.id}#{count}")
