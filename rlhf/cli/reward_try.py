"""`rlhf reward try`: a reward function on rows, as a run calls it."""

import json
import time
from collections.abc import Mapping
from contextlib import closing

from rlhf.config.commands import RowKind
from rlhf.config.tools import RewardTryConfig
from rlhf.engines.rewards import FunctionReward
from rlhf.engines.rewards.function import Call
from rlhf.launch.reward_trial import default_responses, prompts_of, response_of, shown_score, shown_text
from rlhf.orchestrator.data.load import check_rows
from rlhf.terminal import counted, write_line
from rlhf.types import Json, Prompt


def run_reward_try(config: RewardTryConfig) -> int:
    """Score responses to the first rows and print every row with what the function got and gave. Returns the exit code.

    Raises:
        ConfigError: the function cannot be used, or it is not clear what its parameters should get.
        DataError: the rows cannot be read.
        RewardError: the function fails.
    """
    assert config.function is not None, "checked by the config's loader"
    function = config.function
    prompts = prompts_of(check_rows(config.data, RowKind.PROMPTS).records, config.num_rows)
    tried = [(prompt, text) for prompt in prompts for text in config.responses or default_responses(prompt)]
    of_each, texts = [prompt for prompt, _ in tried], [text for _, text in tried]
    rollouts = [response_of(prompt, text) for prompt, text in tried]
    start = time.monotonic()
    with closing(
        FunctionReward(function, timeout_s=config.timeout_s, memory_gib=config.memory_gib, network=config.network)
    ) as reward:
        import_s = time.monotonic() - start
        binding = reward.binding_for(prompts)
        how = "one response at a time" if binding.each else "lists"
        write_line(f"{function} gets {binding.described} ({how}); imported in {import_s:.2f} s")
        start = time.monotonic()
        scores = reward.score(of_each, texts, rollouts)
        seconds = time.monotonic() - start
    call = Call(prompts=of_each, responses=texts, rollouts=rollouts, binding=binding)
    before: Prompt | None = None
    for index, (prompt, text) in enumerate(tried):
        if prompt is not before:
            write_line(f"row {prompt.id}")
            shown = arguments_of(call, index)
            for name, value in shown.items():
                write_line(f"  {name:<12} {value}")
            before = prompt
        write_line(f"    {shown_text(text)} scores {shown_score(scores[index])}")
    for name, mean in scores[0].logged.items():
        write_line(f"logged: reward/{name} {mean:g}")
    write_line(
        f"{counted(len(texts), 'response')} in {seconds:.3f} s, {1000 * seconds / len(texts):.1f} ms each, in one call"
    )
    write_line(f"in a run: --reward.function {function} --data.path {config.data.path}")
    return 0


def arguments_of(call: Call, index: int) -> Mapping[str, str]:
    """What each parameter gets for one response, but for the response itself, as shown text."""
    request = call.request(slice(index, index + 1))
    placed, named = request["placed"], request["named"]
    assert isinstance(placed, list), "a list of lists"
    assert isinstance(named, dict), "lists by name"
    pairs: list[tuple[str, Json]] = [*zip((name for name, _ in call.binding.placed), placed, strict=True)]
    pairs += named.items()
    values = {**dict(call.binding.placed), **call.binding.named}
    return {name: _shown(given) for name, given in pairs if values[name] not in ("responses", "queries", "token_ids")}


def _shown(given: Json) -> str:
    assert isinstance(given, list), "one entry for each response"
    (value,) = given
    return shown_text(value) if isinstance(value, str) else shown_text(json.dumps(value))[1:-1]
