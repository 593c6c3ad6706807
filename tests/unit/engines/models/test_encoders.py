"""A sequence classifier with another head than a score at the last token scores as its own forward does; what cannot
be done with it is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerBase,
)

from rlhf.config.model_files import describe_model, read_model
from rlhf.config.models import ModelSection
from rlhf.config.reward import ModelSource
from rlhf.engines.models.loading import load_model
from rlhf.engines.models.pooled import ALONE, PADDED
from rlhf.engines.models.text_pairs import load_reward_tokenizer
from rlhf.engines.rewards import build_scored
from rlhf.engines.rewards.model import pack
from rlhf.engines.training.local_scoring import LocalScorer
from rlhf.errors import ModelError, RewardError
from rlhf.types import Head, Json, Prompt
from tests.tiny_models import make_reward_model
from tests.unit.engines.rewards.reward_support import rollouts
from tests.unit.orchestrator.data.data_support import LetterTokenizer

pytestmark = pytest.mark.timeout(60)

SIZES: dict[str, object] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 64, "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
OTHER_SIZES: dict[str, dict[str, object]] = {
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "vocab_size": 128, "num_labels": 1},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 128, "num_labels": 1},
    "xlnet": {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48, "vocab_size": 128, "num_labels": 1},
}
FAMILIES = ["bert", "roberta", "xlm-roberta", "modernbert", "deberta-v2", "electra", "albert", *OTHER_SIZES]


def make_classifier(family: str, folder: Path) -> str:
    """Save a tiny classifier of a family and return its class's name."""
    config = CONFIG_MAPPING[family](**OTHER_SIZES.get(family, SIZES))  # type: ignore[arg-type]
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    return type(model).__name__


# transformers compiles functions of DeBERTa by torch.jit when it imports them.
JIT = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
TWO_STACKS = {"t5"}
CPU = torch.device("cpu")


@JIT
@pytest.mark.parametrize(
    ("family", "head", "new_head"),
    [("bert", Head.SCORES, True), ("modernbert", Head.VALUES, True), ("deberta-v2", Head.VALUES, False)],
)
def test_an_encoder_is_neither_trained_nor_a_critic(tmp_path: Path, family: str, head: Head, new_head: bool) -> None:
    name = make_classifier(family, tmp_path)
    said = rf"^reward\.model: a {name} has no score at the last token \(it has .*\)[,;] "
    with pytest.raises(ModelError, match=said):
        load_model(ModelSection(), str(tmp_path), head, where="reward.model", device=CPU, seed=0, new_head=new_head)
    assert f"reward.model: {read_model(tmp_path).other_head}".startswith(f"reward.model: a {name} has no score")


@JIT
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in TWO_STACKS])
def test_an_encoder_scores_as_its_own_forward_does(tmp_path: Path, family: str) -> None:
    make_classifier(family, tmp_path)
    scorer = LocalScorer(ModelSection(), str(tmp_path), Head.SCORES, device="cpu", where="reward.model")
    generator = np.random.default_rng(0)
    sequences = [generator.integers(5, 128, length) for length in (3, 30, 7, 1, 29, 12)]
    (found,) = scorer.forward([pack(sequences)])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor(sequence)[None]).logits[0, 0]) for sequence in sequences]
    assert found.tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(found.tolist())) == len(sequences)
    assert scorer.self_test.passes == (ALONE if family == "xlnet" else PADDED)


@pytest.mark.parametrize("family", sorted(TWO_STACKS))
def test_a_classifier_with_a_decoder_behind_an_encoder_is_refused(tmp_path: Path, family: str) -> None:
    make_classifier(family, tmp_path)
    with pytest.raises(ModelError, match="and reads with an encoder and a decoder; serve it over HTTP"):
        LocalScorer(ModelSection(), str(tmp_path), Head.SCORES, device="cpu", where="reward.model")


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, id2label={0: "a", 1: "b", 2: "c"})
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has 3 labels, need 1"):
        LocalScorer(ModelSection(), str(tmp_path), Head.SCORES, device="cpu", where="reward.model")


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "two", "four", "no", "more", "?", "."]


def save_word_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A BERT tokenizer of whole words, in the model's folder."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_and_a_response_are_a_pair_of_texts(tmp_path: Path, chat: bool) -> None:
    """Which text a token is in changes the score of a BERT."""
    make_classifier("bert", tmp_path)
    tokenizer = save_word_tokenizer(tmp_path)
    source = ModelSource(model=str(tmp_path))
    reward = build_scored(
        source,
        LocalScorer(source, str(tmp_path), Head.SCORES, device="cpu", where="reward.model"),
        policy_tokenizer=LetterTokenizer(),
        reward_tokenizer=load_reward_tokenizer(source, str(tmp_path), key="reward.model"),
    )
    messages: list[Json] = [{"role": "system", "content": "no more"}, {"role": "user", "content": "what is two ?"}]
    prompt = Prompt(
        id="q7",
        token_ids=np.array([1]),
        text="<rendered>" if chat else "what is two ?",
        metadata={"messages": messages} if chat else {},
    )
    responses = ["four .", "no", "two two two two"]
    found = reward.score([prompt] * 3, responses, rollouts(3))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    text = "no more\nwhat is two ?" if chat else "what is two ?"
    with torch.no_grad():
        right = [float(model(**tokenizer(text, response, return_tensors="pt")).logits) for response in responses]
        wrong = model(input_ids=torch.tensor([tokenizer(text, "no")["input_ids"]])).logits
    assert [one.total for one in found] == pytest.approx(right, abs=1e-5)
    assert float(wrong) != pytest.approx(right[1], abs=1e-4)
    with pytest.raises(RewardError, match=r"row q7: prompt and response are \d+ of its tokens, and it reads 64"):
        reward.score([prompt], ["two " * 70], rollouts(1))


def test_positions_behind_the_pad_token_are_fewer(tmp_path: Path) -> None:
    make_classifier("roberta", tmp_path / "roberta")
    make_classifier("bert", tmp_path / "bert")
    assert [describe_model(tmp_path / name).context for name in ("bert", "roberta")] == [64, 63]


def test_a_decoder_is_a_reward_model(tmp_path: Path) -> None:
    assert read_model(make_reward_model(tmp_path / "scorer")).other_head is None
