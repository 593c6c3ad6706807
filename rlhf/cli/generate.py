"""`rlhf generate`: prints samples from a trained model."""

import os
import tempfile
from pathlib import Path

from rlhf.config.tools import GenerateConfig
from rlhf.launch.generate import generate_responses
from rlhf.terminal import is_terminal, library_output_to, tell, write_line


def run_generate(config: GenerateConfig) -> int:
    """Print each prompt and its responses. Returns the exit code.

    Raises:
        ConfigError: no prompt was given, or it does not fit the model.
        ModelError: the model cannot be loaded.
    """
    descriptor, log = tempfile.mkstemp(prefix="rlhf-generate-", suffix=".log")
    os.close(descriptor)
    if is_terminal():
        tell([f"rlhf: loading {config.model}"])
    with library_output_to(Path(log)):
        generated = generate_responses(config)
    Path(log).unlink()
    for prompt, responses in generated:
        write_line(f"> {prompt.text}")
        for response in responses:
            write_line(response)
    return 0
