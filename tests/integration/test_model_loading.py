"""A model that cannot be used is refused with the line that says why."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification

from rlhf.config.models import ModelSection
from rlhf.engines.models.attention import PACKED_SDPA
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.loading import LoadedModel, choose_dtype, load_model
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.errors import ModelError
from rlhf.types import Head, PackedTokens
from tests.tiny_models import make_policy, make_reward_model

Weights = dict[str, torch.Tensor]
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def load(folder: Path | str, head: Head = Head.LOG_PROBS, *, new_head: bool = False, seed: int = 0) -> LoadedModel:
    device = torch.device("cpu")
    return load_model(
        ModelSection(), str(folder), head, where="policy.model", device=device, seed=seed, new_head=new_head
    )


def edit_weights(folder: Path, edit: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def make_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; it is not a Hugging Face model."),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no safetensors weights."),
    "pickle": (make_pickle, "only pickle weights (pytorch_model.bin); convert them to safetensors."),
    "header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        "model.safetensors: damaged safetensors header",
    ),
    "json": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object."),
    "type": (lambda f: edit_config(f, model_type="foo"), 'config.json has model_type "foo", which is not supported'),
    "code": (lambda f: edit_config(f, auto_map={"AutoConfig": "a.B"}), "needs remote code; review it, then set"),
    "shape": (
        lambda f: edit_config(f, vocab_size=256),
        "lm_head.weight: shape [128, 64], config.json gives [256, 64].",
    ),
    "nan": (
        lambda f: edit_weights(f, lambda w: w[UP_PROJ].view(-1)[:12].fill_(torch.nan)),
        f"{UP_PROJ} holds 12 NaN values.",
    ),
    "infinite": (
        lambda f: edit_weights(f, lambda w: w[UP_PROJ].view(-1)[:2].fill_(torch.inf)),
        f"{UP_PROJ} holds 2 infinite values.",
    ),
    "missing": (lambda f: edit_weights(f, lambda w: w.pop(UP_PROJ)), f"1 weights are missing (first: {UP_PROJ})."),
    "surplus": (lambda f: edit_config(f, num_hidden_layers=1), "weights fit nothing in config.json (first: model."),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_rejected(tmp_path: Path, damage: str) -> None:
    hurt, line = DAMAGES[damage]
    hurt(make_policy(tmp_path / "m"))
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "m")
    assert str(caught.value).startswith("policy.model: ")
    assert line in str(caught.value)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "m")
    edit_weights(folder, lambda w: (w.pop("model.norm.weight"), w[UP_PROJ].fill_(torch.nan)))
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("head", [Head.SCORES, Head.VALUES])
def test_a_scorer_needs_one_label_and_a_head(tmp_path: Path, head: Head) -> None:
    with pytest.raises(ModelError, match="has 2 labels, need 1"):
        load(make_reward_model(tmp_path / "two", num_labels=2), head, new_head=True)
    with pytest.raises(ModelError, match=r"has no score head \(LlamaForCausalLM\)"):
        load(make_policy(tmp_path / "policy"), head)


def test_a_new_head_is_seeded_and_one_that_exists_is_kept(tmp_path: Path) -> None:
    policy, reward = make_policy(tmp_path / "policy"), make_reward_model(tmp_path / "reward")

    def score(folder: Path, seed: int) -> torch.Tensor:
        return load(folder, Head.VALUES, new_head=True, seed=seed).model.get_parameter("score.weight").detach()

    assert score(policy, 1).shape == (1, 64)
    assert torch.equal(score(policy, 1), score(policy, 1))
    assert not torch.equal(score(policy, 1), score(policy, 2))
    assert 0.05 < float(score(policy, 1).std()) < 0.2
    assert torch.equal(score(reward, 1), load_file(reward / "model.safetensors")["score.weight"])


def test_token_scores_are_those_of_a_token_classifier(tmp_path: Path) -> None:
    """Loaded from a policy with a new head, saved, loaded back, and asked as one packed batch of two sequences."""
    loaded = load(make_policy(tmp_path / "policy"), Head.TOKEN_SCORES, new_head=True)
    bias = loaded.model.get_parameter("score.bias")
    assert bias.tolist() == [0.0]
    bias.data.fill_(0.25)
    loaded.model.save_pretrained(tmp_path / "prm")
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "prm").eval()
    assert json.loads((tmp_path / "prm" / "config.json").read_text())["architectures"] == [
        "LlamaForTokenClassification"
    ]
    again = load(tmp_path / "prm", Head.TOKEN_SCORES)
    head = PackedModel(again.model, Head.TOKEN_SCORES, LogitsRule(temperature=1.0, chunk_tokens=8))
    sequences = [np.array([5, 6, 7, 8, 9]), np.array([1, 40, 41])]
    packed = PackedTokens(token_ids=np.concatenate(sequences), lengths=np.array([5, 3]))
    with torch.no_grad():
        (said,) = head.eval()(PackedInput.from_numpy(packed, torch.device("cpu")))
        expected = torch.cat([theirs(torch.tensor(one)[None]).logits[0, :, 0] for one in sequences])
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)


def test_a_token_classifier_is_no_sequence_classifier(tmp_path: Path) -> None:
    """Served, neither stands in for the other; trained, each gets the head that it lacks."""
    reward = make_reward_model(tmp_path / "reward")
    with pytest.raises(
        ModelError, match=r"has no score head \(LlamaForSequenceClassification\), need a token classifier"
    ):
        load(reward, Head.TOKEN_SCORES)
    prm = load(reward, Head.TOKEN_SCORES, new_head=True)
    prm.model.save_pretrained(tmp_path / "prm")
    with pytest.raises(ModelError, match=r"\(LlamaForTokenClassification\), need a sequence classifier"):
        load(tmp_path / "prm", Head.SCORES)
    assert load(tmp_path / "prm", Head.VALUES, new_head=True).model.get_parameter("score.weight").shape == (1, 64)
    edit_config(tmp_path / "prm", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ModelError, match="has 2 labels, need 1"):
        load(tmp_path / "prm", Head.TOKEN_SCORES)


def test_dropout_is_off_and_remembered(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "m")
    edit_config(folder, attention_dropout=0.1)
    loaded = load(folder)
    assert loaded.dropouts == {"attention_dropout": 0.1}
    assert loaded.model.config.attention_dropout == 0.0


def test_the_kernel_follows_the_config(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "m")
    assert load(folder).model.config._attn_implementation == PACKED_SDPA


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (GatedRepoError, "policy.model: meta/x is gated; log in with `hf auth login`."),
        (RepositoryNotFoundError, "policy.model: no folder and no hub model of this name (got meta/x)."),
        (LocalEntryNotFoundError, "policy.model: no folder meta/x, not in the hub's cache ("),
    ],
)
def test_a_hub_model_that_cannot_be_had_gets_its_line(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], line: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        error = kind.__new__(kind)
        error.args = ("no connection",)
        raise error

    monkeypatch.setattr("rlhf.engines.models.loading.snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        load("meta/x")
    assert str(caught.value).startswith(line)


def test_a_gpu_without_bfloat16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    gpu = torch.device("cuda")
    with pytest.raises(ModelError, match=r"^policy\.model: dtype bfloat16 is not supported by Tesla V100\. Set dtype"):
        choose_dtype(ModelSection(), gpu, "policy.model")
    assert choose_dtype(ModelSection(dtype="float32"), gpu, "policy.model") is torch.float32
