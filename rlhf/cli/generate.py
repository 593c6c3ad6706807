"""`rlhf generate`: prints samples from a trained model."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlhf.config.tools import GenerateConfig
from rlhf.episode import Episode, shown
from rlhf.launch.generate import generate_responses
from rlhf.terminal import counted, is_terminal, library_output_to, tell, write_line


def run_generate(config: GenerateConfig) -> int:
    """Print each prompt and its responses. Returns the exit code.

    Raises:
        ConfigError, DataError: no prompt was given, or it does not fit the model, or not the environment.
        ModelError: the model cannot be loaded.
    """
    descriptor, log = tempfile.mkstemp(prefix="rlhf-generate-", suffix=".log")
    os.close(descriptor)
    if is_terminal():
        tell([f"rlhf: loading {config.model}"])
    with library_output_to(Path(log)):
        generated = generate_responses(config)
    Path(log).unlink()
    for one in generated:
        write_line(f"> {one.prompt.text}")
        lines = [line for episode in one.episodes for line in turns(episode)] or one.texts
        for line in lines:
            write_line(line)
    return 0


def turns(episode: Episode) -> Iterator[str]:
    """An episode as lines: who said what, then how it ended."""
    for said in episode.messages:
        name = said.fields.get("name")
        yield f"{said.role}{f' {name}' if name else ''}: {shown(said)}"
    counts = [counted(episode.num_turns, "turn"), counted(episode.num_calls, "call")]
    counts += [f"{episode.num_failed_calls} of them failed"] if episode.num_failed_calls else []
    failure = f": {episode.failure}" if episode.failure else ""
    yield f"[{episode.ending}{failure}; {', '.join(counts)}; reward {episode.reward:.4g}]"
