"""The tokenizer of a model: what pads, stops and comes first, and a line for every one that cannot be used."""

import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.config.data import DataSection
from rlhf.engines.base import Tokenizer
from rlhf.engines.models.tokenizer import HfTokenizer, load_tokenizer
from rlhf.errors import DataError, ModelError
from rlhf.types import Message
from tests.unit.orchestrator.data.data_support import load_demonstrations, write_rows

CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
HELLO = [Message(role="user", content="Hi you"), Message(role="assistant", content="yo")]


def byte_tokenizer(
    *, pad: str | None = None, chat: bool = False, ends_with_eos: bool = False
) -> PreTrainedTokenizerFast:
    """Bytes as tokens, after the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [*SPECIAL, *([pad] if pad is not None and pad not in SPECIAL else [])]
    vocabulary = {token: index for index, token in enumerate([*specials, *letters])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = "<s> $A </s>" if ends_with_eos else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path, **generation: object) -> str:
    tokenizer.save_pretrained(folder)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


def test_text_is_unchanged_by_encoding_and_decoding() -> None:
    tokenizer: Tokenizer = HfTokenizer(byte_tokenizer())
    for text in ("Hi you", "  two  spaces , here .", "日本 🙂", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


BYTES = byte_tokenizer(pad="<pad>")
BYTES.add_tokens(["<call tool>", "é", "日本"])


@given(st.lists(st.integers(0, len(BYTES) + 3), max_size=30))
def test_text_is_what_the_library_decodes(token_ids: list[int]) -> None:
    """Bytes that are no UTF-8, texts that were added as a token, and ids without a token included."""
    tokenizer, backend = HfTokenizer(BYTES, stop_token_ids=[20]), BYTES.backend_tokenizer
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == backend.decode(
        token_ids, skip_special_tokens=False
    )
    kept = [token for token in token_ids if token not in tokenizer.stop_token_ids]
    assert tokenizer.decode(token_ids) == backend.decode(kept, skip_special_tokens=True)


@pytest.mark.parametrize("ends_with_eos", [False, True])
def test_special_tokens_are_added_at_the_beginning_and_never_at_the_end(ends_with_eos: bool) -> None:
    tokenizer = HfTokenizer(byte_tokenizer(ends_with_eos=ends_with_eos))
    plain = tokenizer.encode("ab")
    assert tokenizer.encode("ab", add_special_tokens=True) == [0, *plain]
    assert tokenizer.encode("", add_special_tokens=True) == [0]
    assert 1 not in plain


def test_truncation_in_a_tokenizer_file_is_turned_off() -> None:
    tokenizer = byte_tokenizer(pad="<pad>")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=10)
    assert len(HfTokenizer(tokenizer).encode("abcdefg")) == 7


@pytest.mark.parametrize(
    ("pad", "chosen"), [(None, "</s>"), ("</s>", "</s>"), ("<pad>", "<pad>"), ("<|im_end|>", "<|im_end|>")]
)
def test_the_pad_token_is_chosen_by_a_rule_and_logged_once(
    pad: str | None, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fast = byte_tokenizer(pad=pad)
    tokenizer = HfTokenizer(fast)
    assert fast.convert_ids_to_tokens(tokenizer.pad_token_id) == chosen
    told = [message for message in caplog.messages if "is used, and EOS is still trained" in message]
    assert len(told) == (1 if pad in (None, "</s>") else 0)


def test_a_pad_token_of_the_vocabulary_is_used_if_none_is_set() -> None:
    fast = byte_tokenizer(pad="<pad>")
    fast.pad_token = None
    assert HfTokenizer(fast).pad_token_id == 4


def test_eos_is_trained_where_it_also_pads(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(byte_tokenizer(pad="</s>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "response": "b"}])
    (group,) = load_demonstrations(DataSection(path=str(path)), tokenizer).train
    (rollout,) = group.responses
    assert rollout.token_ids.tolist()[-1] == tokenizer.eos_token_id
    assert rollout.loss_mask is None


def test_responses_stop_at_eos_at_generation_configs_tokens_and_at_the_turns_end(tmp_path: Path) -> None:
    assert HfTokenizer(byte_tokenizer()).stop_token_ids == (1,)
    assert HfTokenizer(byte_tokenizer(chat=True)).stop_token_ids == (1, 3)
    assert load_tokenizer(saved(byte_tokenizer(), tmp_path / "a", eos_token_id=[2, 1])).stop_token_ids == (1, 2)
    assert load_tokenizer(saved(byte_tokenizer(), tmp_path / "b", eos_token_id=2)).stop_token_ids == (1, 2)
    assert load_tokenizer(saved(byte_tokenizer(), tmp_path / "c", temperature=1.0)).stop_token_ids == (1,)


def test_control_tokens_are_known() -> None:
    assert set(HfTokenizer(byte_tokenizer()).control_tokens) == set(SPECIAL)


def test_messages_are_rendered_by_the_template() -> None:
    tokenizer = HfTokenizer(byte_tokenizer(chat=True))
    text = tokenizer.render(HELLO[:1], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi you<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(text)[0] == 2
    assert tokenizer.render(HELLO, add_generation_prompt=False).endswith("yo<|im_end|>\n")


def test_no_template_and_a_template_that_raises_are_different_errors() -> None:
    with pytest.raises(ModelError, match=r"^tokenizer: no chat template; set data\.template"):
        HfTokenizer(byte_tokenizer()).render(HELLO, add_generation_prompt=False)
    tool = [Message(role="tool", content="x")]
    with pytest.raises(DataError, match=r"^the chat template refuses the messages: no tools here\.$"):
        HfTokenizer(byte_tokenizer(chat=True)).render(tool, add_generation_prompt=False)


def test_the_fingerprint_depends_on_vocabulary_special_ids_and_template() -> None:
    first = HfTokenizer(byte_tokenizer()).fingerprint()
    assert first == HfTokenizer(byte_tokenizer()).fingerprint()
    others = [
        HfTokenizer(byte_tokenizer(chat=True)).fingerprint(),
        HfTokenizer(byte_tokenizer(pad="<pad>")).fingerprint(),
        HfTokenizer(byte_tokenizer(pad="<|im_end|>")).fingerprint(),
    ]
    assert len({first, *others}) == 4


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(fast := byte_tokenizer(pad="<pad>", chat=True))
    fast.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).fingerprint() == tokenizer.fingerprint()
    assert pickle.loads(pickle.dumps(tokenizer)).encode("ab") == tokenizer.encode("ab")


def test_threads_may_share_a_tokenizer() -> None:
    tokenizer = HfTokenizer(byte_tokenizer())
    texts = [str(number) * 50 for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(text) for text in texts]


def test_a_model_without_eos_is_rejected() -> None:
    fast = byte_tokenizer()
    fast.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        HfTokenizer(fast)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "has no tokenizer.json."),
        ({"config.json": '{"model_type": "llama"}'}, "has no tokenizer.json."),
        ({"tokenizer.json": "{"}, "has a tokenizer that cannot be read"),
        (
            {"config.json": "{}", "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tok.T", null]}}'},
            "needs remote code; review it, then set trust_remote_code to repo@commit.",
        ),
    ],
)
def test_a_folder_without_a_usable_tokenizer_gives_its_line(
    tmp_path: Path, files: dict[str, str], complaint: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError) as error:
        load_tokenizer(str(tmp_path), key="reward.model")
    assert str(error.value).startswith(f"reward.model: {tmp_path} {complaint}")
    assert len(error.value.problems) == 1
    assert "\n" not in str(error.value)


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^policy\.model: .*/none is no folder\.$"):
        load_tokenizer(f"{tmp_path}/none")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (GatedRepoError, "policy.model: meta/x is gated; log in with hf auth login."),
        (RepositoryNotFoundError, "policy.model: meta/x is no folder, and the hub has no such model."),
        (LocalEntryNotFoundError, "policy.model: meta/x is no folder, and the hub cannot be reached."),
    ],
)
def test_a_hub_model_that_cannot_be_loaded_is_reported_without_the_token(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], line: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        cause = kind.__new__(kind)
        cause.args = ("401 for https://hub/meta/x?token=hf_planted",)
        raise OSError("cannot load meta/x with hf_planted") from cause

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr("rlhf.engines.models.hub.hub_is_reachable", lambda: True)
    with pytest.raises(ModelError) as caught:
        load_tokenizer("meta/x")
    assert str(caught.value) == line
