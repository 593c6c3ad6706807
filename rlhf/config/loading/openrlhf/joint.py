"""Flags of OpenRLHF whose meaning depends on other flags, or that become something else by their value."""

import re
from pathlib import PurePath

from rlhf.config.loading.openrlhf.entries import Given, Outcome, plain

ONLINE = "rollout.max_prompt_tokens"
"""A key that only the commands have that sample responses."""
CRITIC_FREE = "algo.scale"
"""A key that only the commands have that learn without a critic."""
LOCAL_ROWS = re.compile(r"^[./~]|[*?]|\.(jsonl?|csv|parquet|arrow|txt|gz)$", re.IGNORECASE)
FUNCTION_FILE = re.compile(r"[A-Za-z_]\w*\.py")


def total_length(given: Given) -> Outcome:
    """`data.max_len`: prompt and response together, where responses are sampled."""
    text = given.words[0]
    if ONLINE not in given.known:
        return Outcome(settings=(("data.max_tokens", text),))
    response = given.word_of("rollout.max_new_tokens")
    spoils = (ONLINE, "rollout.max_response_tokens")
    if not text.isdigit() or not (response or "1").isdigit():
        return Outcome(problem=f"must be a whole number (got {text}).", spoils=spoils)
    if response is None:
        half = int(text) // 2
        note = "a limit of each, not of the sum: half for the prompt, half for the response"
        settings = ((ONLINE, str(half)), ("rollout.max_response_tokens", str(int(text) - half)))
        return Outcome(settings=settings, note=note)
    prompt = int(text) - int(response)
    if prompt < 1:
        text = f"{text} leaves no room for a prompt beside --rollout.max_new_tokens {response}. Raise it."
        return Outcome(problem=text, spoils=spoils)
    return Outcome(settings=((ONLINE, str(prompt)),), note="what --rollout.max_new_tokens leaves for the prompt")


def micro_batch_size(given: Given) -> Outcome:
    """`train.micro_batch_size`: of no effect where batches are cut by tokens."""
    if "train.dynamic_batch_enable" in given.flags:
        return Outcome(nothing="--train.dynamic_batch_enable cuts batches by tokens")
    return Outcome(settings=(("train.micro_batch_size", given.words[0]),))


def colocate_all(given: Given) -> Outcome:
    """`train.colocate_all`: the engines keep devices of their own in asynchronous training."""
    roles = "policy,reference,critic,reward" if "train.async_enable" in given.flags else "all"
    return Outcome(settings=(("cluster.colocate", roles),))


def colocate_critic_reward(given: Given) -> Outcome:
    """`train.colocate_critic_reward`: only where there is a critic."""
    if "critic.model" not in given.known:
        return Outcome(nothing="this command has no critic")
    return Outcome(settings=(("cluster.colocate", "critic,reward"),))


def asynchronous(given: Given) -> Outcome:
    """`train.async_enable`: rollouts run ahead of training by the length of the queue."""
    if "rollout.max_lag" not in given.known:
        return Outcome(problem="this command does not sample. Leave it out.")
    lag = given.word_of("train.async_queue_size") or "1"
    return Outcome(settings=(("rollout.max_lag", lag),), note="policy versions that rollouts may run ahead of training")


def queue_size(given: Given) -> Outcome:
    """`train.async_queue_size`: read together with `train.async_enable`."""
    together = "train.async_enable" in given.flags
    return Outcome(nothing="read with --train.async_enable" if together else "acts only with --train.async_enable")


def max_samples(given: Given) -> Outcome:
    """`data.max_samples`: the first rows of a data set from the hub."""
    path = given.word_of("data.prompt_dataset") or given.word_of("data.dataset") or ""
    split = given.word_of("data.prompt_split") or given.word_of("data.dataset_split") or "train"
    count = plain(given.words)
    if not path or LOCAL_ROWS.search(path) or "[" in split:
        got = f"{path} {split}" if path else "no data set"
        return Outcome(
            problem=f"only a data set from the hub can be cut to its first rows, by a split like train[:{count}] (got "
            f"{got}). Write those rows to a file, or leave this out to read all of them.",
            spoils=("data.split",),
        )
    return Outcome(settings=(("data.split", f"{split}[:{count}]"),))


def split(given: Given) -> Outcome:
    """`data.dataset_split` and `data.prompt_split`: part of what `data.max_samples` sets, where that is given."""
    if "data.max_samples" in given.flags:
        return Outcome(nothing="read with --data.max_samples")
    return Outcome(settings=(("data.split", given.words[0]),))


def rows(given: Given) -> Outcome:
    """Data sets: one here, and a comma-separated list there."""
    text = given.words[0]
    if "," in text or "@" in text:
        return Outcome(
            problem=f"one data set, and no folder of one after @ (got {text}). Join the rows in a file or a glob.",
            spoils=("data.path",),
        )
    return Outcome(settings=(("data.path", text),))


def reward_source(given: Given) -> Outcome:
    """`reward.remote_url`: a service, or a Python file with a function `reward_func`."""
    text = given.words[0]
    if ONLINE not in given.known:
        return Outcome(problem="this command reads no rewards. Leave it out.")
    if "," in text:
        return Outcome(
            problem=f"one address (got {text}). List several under reward.sources, each of type http.",
            spoils=("reward",),
        )
    if not text.endswith(".py"):
        note = "the service is sent {ids, prompts, responses} and must answer {ids, scores}"
        return Outcome(settings=(("reward.url", text),), note=note)
    file = PurePath(text)
    if not FUNCTION_FILE.fullmatch(file.name):
        problem = f"{file.name} is no name of a Python module. Rename it, or use --reward.function module:name."
        return Outcome(problem=problem, spoils=("reward",))
    note = (
        "it is called with (prompts, responses, **columns) and returns a list of floats; run in its folder, or put "
        "that folder on PYTHONPATH"
    )
    return Outcome(settings=(("reward.function", f"{file.stem}:reward_func"),), note=note)


def reward_bounds(given: Given) -> Outcome:
    """`reward.clip_range`: one bound for both sides, in PPO."""
    if "algo.clip_rewards" not in given.known:
        return Outcome(problem="only ppo clips rewards. Clip them in the reward function.")
    low, high = (plain([word]) for word in given.words)
    if f"-{high}" != low:
        text = f"algo.clip_rewards is one bound for both sides (got {low} and {high}). Use -{high} {high}."
        return Outcome(problem=text, spoils=("algo.clip_rewards",))
    return Outcome(settings=(("algo.clip_rewards", high),))


def kl_coefficient(given: Given) -> Outcome:
    """`algo.kl.init_coef`: of a KL in the reward, unless `algo.kl.use_loss` is given."""
    if "algo.kl.coef" not in given.known:
        return Outcome(problem="this command has no such setting. Leave it out.")
    coefficient = (("algo.kl.coef", given.words[0]),)
    if "algo.kl.use_loss" in given.flags or plain(given.words) == "0":
        return Outcome(settings=coefficient)
    return Outcome(settings=(*coefficient, ("algo.kl_placement", "reward")))


def kl_in_loss(given: Given) -> Outcome:
    """`algo.kl.use_loss`: the KL acts in the loss, by the coefficient of another flag."""
    if "algo.kl_placement" not in given.known:
        return Outcome(problem="this command has no such setting. Leave it out.")
    note = "" if "algo.kl.init_coef" in given.flags else "of algo.kl.coef, which may be 0: see --algo.kl.init_coef"
    return Outcome(settings=(("algo.kl_placement", "loss"),), note=note)


def filter_range(given: Given) -> Outcome:
    """`algo.dynamic_filtering_range`: groups whose mean reward lies outside it are left out there."""
    if "algo.dynamic_filtering_enable" not in given.flags:
        return Outcome(nothing="acts only with --algo.dynamic_filtering_enable")
    if plain(given.words) == "0 1":
        return Outcome(nothing="of rewards that are 0 or 1 it leaves out the groups whose rewards are equal, as here")
    text = "groups are left out here where all their rewards are equal, whatever these are. Use 0 1, or leave it out."
    return Outcome(problem=text)
