"""An algorithm of your own, with a critic: actor-critic with a clipped policy loss, as in PPO.

    python examples/custom_algorithm.py --model MODEL

Or from the command line, in this folder: `rlhf train ppo --algo custom --algo.algorithm custom_algorithm:ActorCritic`.
Driver and workers import the class from this file by its name, so that training sits behind `__main__`.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import rlhf
from rlhf.algorithms.advantages import gae, whiten
from rlhf.algorithms.base import LossOutput, Needs, Objective, Outputs, TensorBatch
from rlhf.algorithms.losses import masked, ppo_clip, to_metrics, token_mean
from rlhf.algorithms.responses import ResponseTokens, with_credit
from rlhf.algorithms.rewards import at_end
from rlhf.config.algo import CustomSection
from rlhf.types import Example, Experience, Head, Metrics, Role, Signal, Signals


class ActorCritic(rlhf.Algorithm):
    """The defaults of `rlhf.Algorithm` do the rest: every group is kept, each response is one example."""

    def __init__(self, section: CustomSection) -> None:
        self.clip = float(str(section.settings.get("clip", 0.2)))
        self.gae_lambda = float(str(section.settings.get("gae_lambda", 0.95)))
        self.needs = Needs(
            trains={Role.POLICY: Head.LOG_PROBS, Role.CRITIC: Head.VALUES},
            signals=frozenset({Signal.OLD_LOG_PROBS, Signal.VALUES}),
        )

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        """On the driver, once per step: rewards and values -> advantages and returns."""
        responses = [ResponseTokens.of(example, signal) for example, signal in zip(examples, signals, strict=True)]
        rewards = [at_end(response.score, len(response)) for response in responses]
        estimates = [
            gae(reward, response.values, gamma=1.0, gae_lambda=self.gae_lambda)
            for reward, response in zip(rewards, responses, strict=True)
        ]
        advantages = whiten([advantage for advantage, _ in estimates])
        experiences = [
            Experience(id=example.id, sequences=(with_credit(example, signal, advantage, returns=returns),))
            for example, signal, advantage, (_, returns) in zip(examples, signals, advantages, estimates, strict=True)
        ]
        return experiences, Metrics()

    def objectives(self) -> Mapping[str, Objective]:
        return {Role.POLICY: self.policy_loss, Role.CRITIC: self.critic_loss}

    def policy_loss(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        """On the workers, for each micro-batch of packed tokens [T]."""
        log_ratio = masked(outputs.predictions - batch.signals[Signal.OLD_LOG_PROBS], batch.loss_mask)
        advantages = masked(batch.signals[Signal.ADVANTAGES], batch.loss_mask)
        loss = (ppo_clip(log_ratio, advantages, self.clip, self.clip) * token_mean(batch)).sum()
        return LossOutput(loss=loss, metrics=to_metrics({"policy/loss": loss}))

    def critic_loss(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        error = masked(outputs.predictions - batch.signals[Signal.RETURNS], batch.loss_mask)
        loss = (error.square() / 2 * token_mean(batch)).sum()
        return LossOutput(loss=loss, metrics=to_metrics({"critic/loss": loss}))


def brief(prompts: list[str], responses: list[str], **columns: list[object]) -> list[float]:
    """A reward: -0.1 for each word."""
    return [-0.1 * len(response.split()) for response in responses]


def main(model: str, num_steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text("".join(json.dumps({"prompt": f"Tell me about the number {n}."}) + "\n" for n in range(16)))
        settings = {
            "run.name": "custom_algorithm",
            "policy.model": model,
            "data.path": rows,
            "reward.function": "custom_algorithm:brief",
            "algo": {"type": "custom", "algorithm": "custom_algorithm:ActorCritic", "settings": {"clip": 0.2}},
            "rollout": {"batch_size": 16, "max_prompt_tokens": 64, "max_response_tokens": 32},
            "train": {"num_steps": num_steps, "batch_size": 8},
        }
        result = rlhf.train(rlhf.load_config("ppo", settings=settings))
    print(f"critic/loss {result.metrics['critic/loss']:.4g} after {result.step} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-steps", type=int, default=20)
    main(**vars(parser.parse_args()))
