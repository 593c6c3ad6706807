"""Log-probs of the reference on disk: the same bits whether they were measured now or read, and nothing is trusted."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf.algorithms.kto import KTO
from rlhf.algorithms.sft import SFT
from rlhf.config.algo import KtoSection, SftSection
from rlhf.config.run import TrainSection
from rlhf.engines.fakes import FakeScorer, FakeTrainEngine
from rlhf.errors import NumericsError, RlhfError
from rlhf.orchestrator.data.order import Order
from rlhf.orchestrator.evaluation import LabelEvaluator
from rlhf.orchestrator.step.reference_store import (
    CHUNK_SEQUENCES,
    ReferenceSequence,
    ReferenceStore,
    reference_sequences,
)
from rlhf.orchestrator.step.sources import OfflineSource
from rlhf.orchestrator.step.token_scores import Models
from rlhf.types import FloatArray, Head, PackedTokens, Role, ScoredGroup
from tests.unit.orchestrator.support import TOKENIZER, Run, given_group, labeled_group, sft_run, tables

pytestmark = pytest.mark.timeout(60)

TRAIN = TrainSection(batch_size=3, max_tokens_per_micro_batch=40)


class Rounding(FakeScorer):
    """A reference whose last bits depend on what else is in the forward pass, as those of real kernels do."""

    def __init__(self, num_ranks: int = 1) -> None:
        super().__init__(np.linspace(-1.0, 1.0, TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks)
        self.num_tokens = 0

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        self.num_tokens += sum(len(batch.token_ids) for batch in batches)
        said = super().forward(batches)
        return [array * np.float32(1 + 1e-6 * len(array)) for array in said]


def sequences(count: int, seed: int = 0) -> list[ReferenceSequence]:
    """All different."""
    generator = np.random.default_rng(seed)
    return [
        ReferenceSequence(
            np.array([*(i // 9**k % 9 for k in range(4)), *generator.integers(2, 9, size=generator.integers(1, 9))])
        )
        for i in range(count)
    ]


def batch_of(asked: Sequence[ReferenceSequence]) -> PackedTokens:
    return PackedTokens(
        token_ids=np.concatenate([one.token_ids for one in asked]),
        lengths=np.array([len(one.token_ids) for one in asked]),
    )


class Setup:
    """Opens stores on one folder, and keeps their messages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self.lines: list[str] = []

    def open(self, asked: Sequence[ReferenceSequence]) -> ReferenceStore:
        return ReferenceStore(self.folder, asked, TRAIN, repaired=lambda repair: self.warnings.append(repair.text))

    def filled(
        self,
        asked: Sequence[ReferenceSequence],
        reference: Rounding | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> ReferenceStore:
        store = self.open(asked)
        store.fill(reference or Rounding(), say=self.lines.append, check=check)
        return store


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "cache" / "model")


def test_what_was_measured_is_read_bit_for_bit(setup: Setup) -> None:
    asked = sequences(CHUNK_SEQUENCES + 50)
    assert not setup.open(asked).is_complete
    first = setup.filled(asked)
    again = setup.open(asked)
    assert first.is_complete
    assert again.is_complete
    assert len(list(setup.folder.iterdir())) == 2
    for start in range(0, len(asked), 7):  # packed as a step would, which is not how they were measured
        batch = batch_of(asked[start : start + 7])
        assert again.forward([batch])[0].tobytes() == first.forward([batch])[0].tobytes()
    expected = FakeScorer(Rounding().table, Head.LOG_PROBS).forward([batch_of(asked)])[0]
    np.testing.assert_allclose(again.forward([batch_of(asked)])[0], expected, rtol=1e-4)
    assert setup.warnings == []


def test_the_bits_do_not_depend_on_ranks_or_the_order_of_rows(setup: Setup, tmp_path: Path) -> None:
    asked = sequences(60)
    one = setup.filled(asked)
    other = Setup(tmp_path / "other").filled([*asked[::-1], *asked[:9]], Rounding(num_ranks=3))
    assert one.forward([batch_of(asked)])[0].tobytes() == other.forward([batch_of(asked)])[0].tobytes()
    assert setup.open([*asked[3:], *asked[:3], asked[5]]).is_complete


def test_sequences_of_one_token_and_padding_are_not_read(setup: Setup) -> None:
    store = setup.filled(sequences(1))
    batch = PackedTokens(token_ids=np.array([7, 3]), lengths=np.array([1, 1]))
    assert store.forward([batch])[0].tolist() == [0.0, 0.0]


def test_other_rows_and_other_packing_are_measured_anew(setup: Setup) -> None:
    asked = sequences(5)
    setup.filled(asked)
    assert not setup.open(sequences(6)).is_complete
    assert not ReferenceStore(
        setup.folder, asked, TRAIN.model_copy(update={"max_tokens_per_micro_batch": 41}), repaired=print
    ).is_complete
    assert not ReferenceStore(setup.folder.parent / "another", asked, TRAIN, repaired=print).is_complete


class StoppedError(Exception):
    pass


def test_a_fill_that_was_cut_short_goes_on_where_it_ended(setup: Setup, tmp_path: Path) -> None:
    asked = sequences(2 * CHUNK_SEQUENCES + 50)
    calls = iter(range(10))

    def check() -> None:
        if next(calls) == 2:
            raise StoppedError

    whole, first, second = Rounding(), Rounding(), Rounding()
    with pytest.raises(StoppedError):
        setup.filled(asked, first, check)
    resumed = setup.filled(asked, second)
    untouched = Setup(tmp_path / "untouched").filled(asked, whole)
    assert first.num_tokens + second.num_tokens == whole.num_tokens
    assert second.num_tokens < first.num_tokens
    assert resumed.forward([batch_of(asked)])[0].tobytes() == untouched.forward([batch_of(asked)])[0].tobytes()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rename_the_array(path: Path) -> None:
    save_file({"other": load_file(path)["log_probs"]}, path)


def drop_an_entry(path: Path) -> None:
    save_file({"log_probs": load_file(path)["log_probs"][:-1]}, path)


def forget_the_digest(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, rename_the_array, drop_an_entry, forget_the_digest])
def test_a_damaged_file_is_measured_again_with_a_warning(setup: Setup, damage: Callable[[Path], None]) -> None:
    asked = sequences(30)
    whole = setup.filled(asked)
    (path,) = setup.folder.iterdir()
    damage(path)
    store = setup.open(asked)
    assert not store.is_complete
    assert len(setup.warnings) == 1
    assert str(path) in setup.warnings[0]
    store.fill(Rounding(), say=setup.lines.append, check=lambda: None)
    assert setup.open(asked).is_complete
    assert store.forward([batch_of(asked)])[0].tobytes() == whole.forward([batch_of(asked)])[0].tobytes()


def test_log_probs_that_are_not_finite_are_not_kept(setup: Setup) -> None:
    broken = Rounding()
    broken.table[5] = np.nan
    with pytest.raises(NumericsError, match="log-probs are not finite"):
        setup.filled(sequences(30), broken)
    assert not setup.open(sequences(30)).is_complete


def test_a_sequence_that_nobody_announced_is_an_error(setup: Setup) -> None:
    store = setup.filled(sequences(3))
    with pytest.raises(RlhfError, match="did not announce"):
        store.forward([batch_of(sequences(4, seed=1))])


def kto_run(path: Path, **changes: object) -> Run:
    """KTO on responses to several prompts: each is also scored beside another prompt, which depends on the step."""
    engines = {Role.POLICY: FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=2)}
    rows = [labeled_group(i, ["abcd"[i % 4] * (1 + i % 3), "e" * (1 + i % 2)], [True, False]) for i in range(7)]
    return replace(sft_run(path), algorithm=KTO(KtoSection()), engines=engines, rows=rows, **changes)  # type: ignore[arg-type]


def announced(run: Run, held_out: Sequence[ScoredGroup]) -> list[ReferenceSequence]:
    algorithm = KTO(KtoSection())
    source = OfflineSource(Order(run.rows, seed=3), run.batch_size, algorithm.keep)
    return list(reference_sequences(source, run.num_steps, algorithm, held_out))


def test_a_whole_run_asks_for_nothing_that_was_not_announced(setup: Setup, tmp_path: Path) -> None:
    """The second run reads what the first one's reference said; both are the same run."""
    held_out = [labeled_group(20 + i, ["ab"[i]], [i == 1]) for i in range(2)]
    trained = []
    for name in ("cold", "warm"):
        run = kto_run(tmp_path / name, evaluate_every=2)
        store = setup.open(announced(run, held_out))
        assert store.is_complete == (name == "warm")
        if name == "cold":
            store.fill(Rounding(), say=setup.lines.append, check=lambda: None)
        models = Models(trained=dict(run.engines), reference=store)
        run.reference = store
        run.evaluator = LabelEvaluator(models, KTO(KtoSection()), held_out, run.train)
        run.run()
        trained.append(tables(run))
    assert trained[0] == trained[1]


def test_every_row_is_announced_whatever_the_seed(setup: Setup) -> None:
    rows = [given_group(i, ["abcdefgh"[i % 8] * (1 + i)], [0.0]) for i in range(9)]
    algorithm = SFT(SftSection())
    for seed in (1, 2):
        source = OfflineSource(Order(rows, seed=seed), 3, algorithm.keep)
        store = setup.open(list(reference_sequences(source, 4, algorithm, [])))
        assert store.is_complete == (seed == 2)
        if seed == 1:
            store.fill(Rounding(), say=setup.lines.append, check=lambda: None)


def test_a_run_that_continues_with_a_smaller_batch_knows_all_of_its_sequences() -> None:
    rows = [given_group(i, ["abcdefgh"[i % 8] * (1 + i // 8)], [0.0]) for i in range(32)]
    algorithm = SFT(SftSection())

    def asked(batch_size: int, resumed: tuple[int, int] | None = None) -> list[bytes]:
        source = OfflineSource(Order(rows, seed=3), batch_size, algorithm.keep)
        return [one.key for one in reference_sequences(source, 8, algorithm, [], resumed)]

    continued = OfflineSource(Order(rows, seed=3), 1, algorithm.keep)
    continued.start(5, 8, 16)  # after four steps of four rows
    needed = {
        ReferenceSequence(example.sequences[0].token_ids).key
        for step in range(5, 9)
        for example in algorithm.select(continued.take(step).groups)
    }
    assert not needed <= set(asked(1))
    assert needed <= set(asked(1, resumed=(5, 16)))
    assert set(asked(4, resumed=(5, 16))) == set(asked(4)), "what is stored would get other names"
