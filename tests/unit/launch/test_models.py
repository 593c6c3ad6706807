"""What the driver refuses by the small files of models, before it joins or starts a cluster."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, BertConfig

from rlhf.config.commands import TrainConfig
from rlhf.config.loading.load import load_config
from rlhf.config.model_files import read_model
from rlhf.engines.models import loading
from rlhf.errors import ConfigError, ModelError
from rlhf.launch.model_checks import misfits
from rlhf.launch.models import require_models
from tests.tiny_models import make_policy, tiny_config, tiny_tokenizer

Hub = Callable[..., None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Models on a hub that gives no weights to who does not ask for them."""

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str], etag_timeout: float) -> str:
        assert revision is None
        assert etag_timeout <= 3.0
        assert not [pattern for pattern in allow_patterns if "safetensors" in pattern]
        return str(tmp_path / name)

    def publish(name: str, *, vocab_size: int = 128, **changed: object) -> None:
        folder = tmp_path / name
        tiny_tokenizer().save_pretrained(folder)
        tiny_config(vocab_size=vocab_size).save_pretrained(folder)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changed))

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    return publish


def ppo(**models: str) -> TrainConfig:
    named = [word for role, model in models.items() for word in (f"--{role}.model", model)]
    lengths = ("--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "8")
    data = ("--data.path", "rows.jsonl", "--reward.function", "rewards:length")
    return load_config("ppo", [*named, *lengths, *data], {})


def test_models_of_the_hub_that_fit_are_let_through(hub: Hub) -> None:
    hub("org/policy")
    hub("org/critic")
    require_models(ppo(policy="org/policy", critic="org/critic"))


def test_models_of_the_hub_that_do_not_fit_are_refused_before_anything_starts(hub: Hub) -> None:
    hub("org/policy")
    hub("org/other", vocab_size=130)
    with pytest.raises(ModelError) as error:
        require_models(ppo(policy="org/policy", reference="org/other"))
    assert error.value.problems == (
        "reference.model, policy.model: vocab differs from policy (130 vs 128); KL is undefined.",
    )


def test_all_that_is_wrong_is_said_at_once(hub: Hub) -> None:
    hub("org/policy", max_position_embeddings=20)
    hub("org/strange", model_type="nobody-knows-it")
    hub("org/coded", auto_map={"AutoConfig": "configuration.Coded"})
    with pytest.raises(ConfigError) as error:
        require_models(ppo(policy="org/policy", reference="org/strange", critic="org/coded"))
    coded, strange, long = sorted(error.value.problems)
    assert coded == "critic.model: needs remote code; review it, then set trust_remote_code to org/coded@<commit>."
    assert strange.startswith('reference.model: config.json has model_type "nobody-knows-it", which is not supported')
    assert long.endswith("16 + 8 tokens > context 20 of org/policy. Lower rollout.max_response_tokens to 4.")
    assert error.value.exit_code == 2


def test_a_model_that_is_not_there_is_told_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        require_models(ppo(policy=str(tmp_path)))
    assert error.value.problems == (f"policy.model: {tmp_path} has no config.json; it is not a Hugging Face model.",)


def test_an_encoder_may_score_but_not_be_a_critic_or_judge_steps(tmp_path: Path) -> None:
    make_policy(tmp_path / "policy")
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1, id2label={0: "a"}
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "scorer")
    policy, scorer = str(tmp_path / "policy"), str(tmp_path / "scorer")
    facts = {name: read_model(Path(name)) for name in (policy, scorer)}

    def problems(method: str, *words: str) -> list[str]:
        lengths = ("--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "8")
        named = ("--policy.model", policy, "--data.path", "rows.jsonl", *lengths, *words)
        return [f"{problem}" for problem in misfits(load_config(method, named, {}), facts)]

    assert problems("grpo", "--reward.model", scorer) == []
    shared = ("--reward.num-gpus-per-node", "2", "--reward.sequence-parallel-size", "2")
    (refusal,) = problems("grpo", "--reward.model", scorer, *shared)
    assert "processes of scorer, which has no score at the last token, share nothing. Set 1." in refusal
    said = "\n".join(problems("ppo", "--reward.model", scorer))
    assert "a BertForSequenceClassification has no score at the last token (it has classifier)" in said
    assert "neither be trained nor be a critic or a PRM" in said
