"""PPO, written out: everything that `rlhf train ppo` does in a step, in one file, with the same workers and engines.

    python examples/the_whole_loop.py

Ray actors host a policy, a reference and a critic (DeepSpeed ZeRO-3) and a rollout engine (vLLM if it is installed,
else transformers). Each step samples responses, scores them, computes log-probs and values, estimates advantages with
GAE, trains policy and critic, and sends the new weights to the engine. `rlhf/orchestrator/loop.py` is the same
loop for every algorithm, with checkpoints, resume, evaluation, restarts and asynchronous rollouts around it.

The task needs no data and no download: a tiny Llama with random weights learns to answer in lowercase letters.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import rlhf
from rlhf.actors.cluster import Cluster
from rlhf.actors.groups import GroupEngine
from rlhf.actors.launcher import Launcher
from rlhf.actors.rollout import RolloutPool
from rlhf.algorithms.advantages import gae, whiten
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.sequences import join
from rlhf.config.algo import PpoSection
from rlhf.config.commands import PpoConfig
from rlhf.engines.base import generate
from rlhf.engines.models.fresh_model import make_llama, train_tokenizer
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.launch.specs import make_launch_spec
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, pack_tokens, plan_batches, unpack_tokens
from rlhf.planning.roles import place
from rlhf.types import (
    Experience,
    FloatArray,
    LearnedSequence,
    Prompt,
    Role,
    RolloutRequest,
    Sampling,
    Signal,
    TokenSequence,
)

PROMPTS = ("red", "green", "blue", "one", "two", "three", "four", "five")
GROUP_SIZE = 8
KL_COEF = 0.01


def main(num_steps: int, folder: Path) -> list[float]:
    """Train for `num_steps` steps. Returns the mean reward of each."""
    config = make_config(make_model(folder / "model"), num_steps)
    assert isinstance(config.algo, PpoSection)
    algorithm = PPO(config.algo)  # says which models it needs; its losses run on the workers
    placement = place(config, algorithm.needs)
    num_updates = dict.fromkeys(algorithm.needs.trains, num_steps)
    with Cluster(config.cluster, "the-whole-loop") as cluster:
        spec = make_launch_spec(config, algorithm.needs, placement, num_updates, cluster.device)
        launcher = Launcher(cluster, placement, spec, start_timeout_s=600, collective_timeout_s=600, on_replaced=None)
        workers = launcher.launch(lambda rewards: None)
        models = {
            role: GroupEngine(group, role, step_timeout_s=600, sync_timeout_s=600)
            for role, group in workers.groups.items()
        }
        assert workers.engines is not None
        engine = RolloutPool(workers.engines, generate_timeout_s=600, control_timeout_s=600)
        return [train_step(step, config, models, engine) for step in range(1, num_steps + 1)]


def train_step(step: int, config: PpoConfig, models: dict[Role, GroupEngine], engine: RolloutPool) -> float:
    """One step of PPO (Schulman et al. 2017; for language models Ouyang et al. 2022). Returns the mean reward."""
    policy, critic, reference = models[Role.POLICY], models[Role.CRITIC], models[Role.REFERENCE]

    # 1. Sample with the weights of the previous step: strictly on-policy.
    policy.send_weights(version=step - 1)
    tokenizer = load_tokenizer(config.policy.model or "")
    prompts = [make_prompt(text, tokenizer.encode(text)) for text in PROMPTS for _ in range(GROUP_SIZE)]
    rollouts = generate(engine, [make_request(step, n, prompt) for n, prompt in enumerate(prompts)])

    # 2. Score each response, here by a rule. A reward model or an HTTP service is also possible.
    scores = [score(tokenizer.decode(rollout.token_ids.tolist())) for rollout in rollouts]

    # 3. Log-probs under policy and reference, and values: one number per token, in packed micro-batches.
    sequences = [join(prompt, rollout) for prompt, rollout in zip(prompts, rollouts, strict=True)]
    old_log_probs = per_token(policy, sequences)
    ref_log_probs = per_token(reference, sequences)
    values = per_token(critic, sequences)

    # 4. Credit: a KL penalty on every token, the score on the last one; then GAE; then whitening over the batch.
    masks = [sequence.loss_mask for sequence in sequences]
    credit = []
    for mask, old, ref, value, one in zip(masks, old_log_probs, ref_log_probs, values, scores, strict=True):
        rewards = -KL_COEF * (old - ref)[mask].astype(np.float64)
        rewards[-1] += one
        credit.append(gae(rewards, value[mask].astype(np.float64), gamma=1.0, gae_lambda=0.95))
    advantages = whiten([advantage for advantage, _ in credit])

    # 5. Collect all signals that the losses need, aligned with the tokens.
    experiences = []
    for n, sequence in enumerate(sequences):
        signals = {
            Signal.OLD_LOG_PROBS: old_log_probs[n],
            Signal.VALUES: values[n],
            Signal.ADVANTAGES: on_tokens(sequence, advantages[n]),
            Signal.RETURNS: on_tokens(sequence, credit[n][1]),
        }
        experiences.append(experience(sequence, signals))

    # 6. One optimizer step each. Denominators are those of the whole batch, independent of the split over ranks.
    for role, model in ((Role.POLICY, policy), (Role.CRITIC, critic)):
        plan = plan_batches(experiences, limits(model))
        metrics = model.forward_backward(build_batches(plan, experiences, objective=role)).metrics
        report = model.optim_step()
        print(f"  {role:6} loss {metrics.sums[f'{role}/loss']:8.4f}  gradient norm {report.grad_norm:.3f}")
    reward = float(np.mean(scores))
    print(f"step {step}: reward {reward:.3f}")
    return reward


def per_token(model: GroupEngine, sequences: Sequence[TokenSequence]) -> list[FloatArray]:
    """A model's output for each token of each sequence: [n] log-probs or values."""
    examples = [experience(sequence, {}) for sequence in sequences]
    plan = plan_batches(examples, limits(model))
    outputs = unpack_tokens(plan, examples, model.forward(pack_tokens(plan, examples)))
    return [outputs[i][0] for i in range(len(examples))]


def experience(sequence: TokenSequence, signals: Mapping[Signal, FloatArray]) -> Experience:
    """A training example: a single sequence with its signals. No KL or penalty in the loss."""
    learned = LearnedSequence(token_ids=sequence.token_ids, loss_mask=sequence.loss_mask, signals=signals)
    return Experience(id="", sequences=(learned,), coefficients={"kl": 0.0, "penalty": 0.0})


def limits(model: GroupEngine) -> MicroBatchLimits:
    return MicroBatchLimits(num_ranks=model.num_ranks, max_tokens_per_micro_batch=2048)


def on_tokens(sequence: TokenSequence, numbers: np.ndarray) -> FloatArray:
    """Values for the response's tokens, 0 on the prompt."""
    aligned = np.zeros(len(sequence), dtype=np.float32)
    aligned[sequence.loss_mask] = numbers
    return aligned


def score(response: str) -> float:
    """The share of lowercase letters."""
    return sum("a" <= character <= "z" for character in response) / max(len(response), 1)


def make_prompt(text: str, token_ids: Sequence[int]) -> Prompt:
    return Prompt(id=text, text=text, token_ids=np.array(token_ids, dtype=np.int64))


def make_request(step: int, n: int, prompt: Prompt) -> RolloutRequest:
    """A request with its own seed, so its response does not depend on the other requests in the batch."""
    sampling = Sampling(max_tokens=16, temperature=1.0)
    return RolloutRequest(
        id=f"{step}/{n}",
        prompt_id=prompt.id,
        prompt_token_ids=prompt.token_ids,
        seed=1000 * step + n,
        sampling=sampling,
    )


def make_model(folder: Path) -> Path:
    """A Llama with 0.2 million random weights, and a byte-level tokenizer."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(PROMPTS, 300, folder)
    make_llama(folder, vocab_size=len(tokenizer), hidden_size=64, num_layers=2)
    return folder


def make_config(model: Path, num_steps: int) -> PpoConfig:
    config = rlhf.load_config(
        "ppo",
        settings={
            "policy": {"model": model, "lr": 2e-2, "warmup_ratio": 0.0},
            "critic": {"lr": 2e-2, "warmup_ratio": 0.0},
            "reward.rules": ["number"],  # not used: this file computes its own scores
            "data.path": "none",
            "rollout": {"max_prompt_tokens": 16, "max_response_tokens": 16, "kv_cache_gib": 0.1},
            "algo.correction": {"type": "none"},  # strictly on-policy: importance weights would be 1
            "train.num_steps": num_steps,
        },
    )
    assert isinstance(config, PpoConfig)
    return config


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=25)
    with tempfile.TemporaryDirectory() as folder:
        rewards = main(parser.parse_args().num_steps, Path(folder))
    print(f"mean reward: {rewards[0]:.3f} in the first step, {rewards[-1]:.3f} in the last")
