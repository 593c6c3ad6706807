"""`rlhf generate`: prints samples from a trained model."""

from rlhf.config.tools import GenerateConfig
from rlhf.launch.generate import generate_responses
from rlhf.terminal import write_line


def run_generate(config: GenerateConfig) -> int:
    """Print each prompt and its responses. Returns the exit code.

    Raises:
        ConfigError: no prompt was given, or it does not fit the model.
        ModelError: the model cannot be loaded.
    """
    for prompt, responses in generate_responses(config):
        write_line(f"> {prompt.text}")
        for response in responses:
            write_line(response)
    return 0
