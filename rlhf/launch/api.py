"""The Python API: the same runs, checks, restarts and errors as the `rlhf` command.

Heavy parts are imported by the function that needs them, so that loading and checking a config stays fast.
"""

# ruff: noqa: PLC0415

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rlhf.config.commands import TrainConfig
from rlhf.config.loading.load import read_config
from rlhf.config.tools import GenerateConfig
from rlhf.errors import ConfigError
from rlhf.importing import importing
from rlhf.launch.full_check import check_config

if TYPE_CHECKING:
    from rlhf.launch.train import TrainResult


Reward: TypeAlias = Callable[..., object]
"""A reward function of your own, `(prompts, responses, labels, **columns) -> numbers`: a callable of a module, named by
`reward.function` as `module:name`.

Its parameters are filled by name: `prompts`, `responses` and `labels`, or a column's own name, each a list with one
entry for each response of a step. It returns one number for each response, None for those that nothing should be
learned from, or a dict with a `score` and other numbers, which become metrics. It runs in its own process.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Responses sampled to one prompt."""

    prompt: str
    """The prompt as the model saw it, through its chat template if it has one."""
    responses: tuple[str, ...]


def load_config(
    method: str, file: str | Path | None = None, settings: Mapping[str, object] | None = None
) -> TrainConfig:
    """The resolved config of a run: defaults, then `file`, then `RLHF__SECTION__KEY` variables, then `settings`.

    Args:
        method: ppo, grpo, online-dpo, online-kto, dpo, kto, sft, rm or prm.
        file: a YAML file, as for `rlhf train`.
        settings: values by dotted key, `{"policy.lr": 1e-6}`, or nested, `{"policy": {"lr": 1e-6}}`. Paths may be
            `pathlib.Path`. `reward.function` and `algo.algorithm` take the function or class itself, where it is
            defined in a module.

    Raises:
        ConfigError: with every problem, one line each.
    """
    merged = read_config(method, [] if file is None else [str(file)], os.environ, settings or {})
    if merged.problems or merged.config is None:
        raise ConfigError(merged.problems)
    return merged.config.resolved()


def check(config: TrainConfig) -> list[str]:
    """Find what can be known to be wrong with a run, without starting anything: `rlhf check`.

    Returns warnings, one line each.

    Raises:
        ConfigError: with every problem, one line each; DataError or ModelError if all are of that kind.
        RewardError: a reward function fails on the first rows.
    """
    warnings = check_config(config, os.environ)
    with importing():
        from rlhf.launch.preflight import preflight
    preflight(config, os.environ)
    return warnings


def train(config: TrainConfig, *, progress: bool = True) -> "TrainResult":
    """Check a config, then train to the end: the same attempts, restarts and checkpoints as `rlhf train`.

    Starts Ray, or joins the cluster at `cluster.address`, and leaves it at the end, so that it can be called again in
    the same process. `config.checkpoint.resume` continues a run. A call from the main thread stops at a safe point on
    SIGINT and SIGTERM.

    Args:
        config: from `load_config`.
        progress: print warnings and progress to stdout: a live panel in a terminal, one line per step elsewhere (a
            notebook, a file).

    Raises:
        ConfigError, DataError, ModelError: before anything starts.
        PreemptedError: the run was asked to stop; it can be resumed.
        RlhfError: the run failed; its subclass says how.
    """
    warnings = check_config(config, os.environ)
    with importing():
        from rlhf.launch.train import run_training
        from rlhf.orchestrator.run.console import Console, SilentConsole, make_console

    def open_console(num_steps: int) -> Console:
        console = make_console(num_steps) if progress else SilentConsole()
        for warning in warnings:
            console.say(f"warning: {warning}")
        return console

    return run_training(config, open_console)


def generate(
    model: str | Path,
    prompts: Sequence[str],
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    engine: str = "auto",
) -> list[Generation]:
    """Sample responses from a trained model in this process, like `rlhf generate`.

    Args:
        model: a folder (`TrainResult.model`) or a hub name.
        prompts: texts, which become prompts as in the run that trained the model (data.template, data.prompt_format).
            Otherwise they are user messages where the model has a chat template, else plain text.
        max_tokens: longest response.
        temperature: divides the logits; 0 is greedy.
        num_samples: responses to each prompt.
        seed: decides the samples.
        engine: auto, vllm or transformers.

    Raises:
        ConfigError: an argument is out of range.
        ModelError: the model cannot be loaded.
    """
    from pydantic import ValidationError

    with importing():
        from rlhf.launch.generate import generate_responses
    try:
        config = GenerateConfig.model_validate(
            {
                "model": str(model),
                "prompt": tuple(prompts),
                "max_tokens": max_tokens,
                "temperature": temperature,
                "num_samples": num_samples,
                "seed": seed,
                "engine": engine,
            }
        )
    except ValidationError as error:
        problems = [f"generate: {'.'.join(map(str, one['loc']))}: {one['msg']}." for one in error.errors()]
        raise ConfigError(problems) from None
    if not prompts:
        return []
    return [Generation(prompt=one.prompt.text, responses=one.texts) for one in generate_responses(config)]
