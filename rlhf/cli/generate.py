"""`rlhf generate`: prints samples from a trained model."""

from rlhf.config.tools import GenerateConfig
from rlhf.launch.generate import generate_responses
from rlhf.orchestrator.run.console import visible


def run_generate(config: GenerateConfig) -> int:
    """Print each prompt and its responses. Returns the exit code.

    Raises:
        ConfigError: no prompt was given, or it does not fit the model.
        ModelError: the model cannot be loaded.
    """
    for prompt, responses in generate_responses(config):
        print(f"> {visible(prompt.text)}")  # noqa: T201  this command's output
        for response in responses:
            print(visible(response))  # noqa: T201
    return 0
