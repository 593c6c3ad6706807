"""A sequence classifier with another head than a score at the last token is refused by name, before it is loaded."""

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from rlhf.config.model_files import read_model
from rlhf.config.models import ModelSection
from rlhf.engines.models.loading import load_model
from rlhf.errors import ModelError
from rlhf.types import Head
from tests.tiny_models import make_reward_model

pytestmark = pytest.mark.timeout(60)

SIZES: dict[str, object] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 64, "num_labels": 1, "pad_token_id": 0,
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
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("new_head", [False, True])
def test_an_encoder_is_no_reward_model(tmp_path: Path, family: str, new_head: bool) -> None:
    name = make_classifier(family, tmp_path)
    said = rf"a {name} has no score head at the last token \(it has .*\); only decoder models can be reward models here"
    assert (why := read_model(tmp_path).other_head) is not None
    with pytest.raises(ModelError, match=rf"^reward\.model: {said}") as error:
        load_model(
            ModelSection(), str(tmp_path), Head.SCORES, where="reward.model", device=torch.device("cpu"), seed=0,
            new_head=new_head,
        )  # fmt: skip
    assert str(error.value) == f"reward.model: {why}"


def test_a_decoder_is_a_reward_model(tmp_path: Path) -> None:
    assert read_model(make_reward_model(tmp_path / "scorer")).other_head is None
