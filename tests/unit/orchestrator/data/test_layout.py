"""A path means what its names say: splits of folders, of saved data sets and of globs, read as the usual loader reads
them, and what is left out is named."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config.commands import RowKind
from rlhf.config.data import DataSection
from rlhf.errors import DataError
from rlhf.orchestrator.data import check_rows, load_prompts
from rlhf.orchestrator.data.layout import KEYWORDS, held_out_split, split_files, training_split
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.sources import Place, place_of, read_rows
from tests.unit.orchestrator.data.data_support import PLAIN, complaints, section, write_rows


def lay_out(folder: Path, names: Sequence[str]) -> Path:
    """Files that each hold one row, whose prompt is the file's name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(folder / name, [{"prompt": name}])
    return folder


def read(path: Path | str, split: str = "train") -> tuple[list[object], list[str]]:
    """Prompts of the split, and the notes of what is not read."""
    problems = Problems(0)
    rows = read_rows(str(path), training_split(DataSection(split=split)), problems)
    problems.settle()
    return [row.values["prompt"] for row in rows], problems.notes


SPLITS: list[tuple[str, dict[str, list[str]]]] = [
    ("files", {"train": ["train.jsonl"], "test": ["test.jsonl"]}),
    ("numbered", {"train": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], "test": ["test_0.jsonl"]}),
    ("words", {"train": ["my-training.v1.jsonl"], "validation": ["my_dev 2.jsonl"], "test": ["evaluation1.jsonl"]}),
    (
        "folders",
        {"train": ["train/a.jsonl", "train/b.jsonl"], "validation": ["val/eval.jsonl"], "test": ["x/test/c.jsonl"]},
    ),
    ("data", {"train": ["data/train.jsonl"], "validation": ["data/valid.jsonl"]}),
    (
        "shards of any name",
        {"train_sft": ["data/train_sft-00000-of-00001.jsonl"], "test_sft": ["data/test_sft-00000-of-00001-ab12.jsonl"]},
    ),
    ("no names", {"train": ["a.jsonl", "b/c.jsonl", "contest.jsonl", "retrained.jsonl"]}),
]


@pytest.mark.parametrize(("splits"), [case[1] for case in SPLITS], ids=[case[0] for case in SPLITS])
def test_each_split_of_a_folder_is_what_the_usual_loader_reads(tmp_path: Path, splits: dict[str, list[str]]) -> None:
    folder = lay_out(tmp_path / "set", [name for names in splits.values() for name in names])
    patterns = datasets.data_files.get_data_patterns(str(folder))
    for split, names in splits.items():
        assert read(folder, split)[0] == names
        files = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=str(folder))[split]
        assert sorted(str(Path(file).relative_to(folder)) for file in files) == names


WORDS = st.sampled_from([*KEYWORDS, "data", "contest", "x", "trains", "Test"])
NAMES = st.lists(WORDS, min_size=1, max_size=2).flatmap(
    lambda words: st.sampled_from(["-", ".", "_", " ", "0"]).map(lambda separator: separator.join(words))
)
TREES = st.lists(st.tuples(st.lists(NAMES, max_size=2), NAMES), min_size=1, max_size=4, unique_by=str)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TREES)
def test_any_names_mean_what_they_mean_to_the_usual_loader(
    tmp_path_factory: pytest.TempPathFactory, tree: list[tuple[list[str], str]]
) -> None:
    folder = tmp_path_factory.mktemp("set")
    files = sorted(lay_out(folder, ["/".join([*folders, f"{name}.jsonl"]) for folders, name in tree]).rglob("*.jsonl"))
    patterns = datasets.data_files.get_data_patterns(str(folder))
    theirs = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=str(folder))
    ours = split_files(files, folder) or {"train": files}
    assert {split: sorted(map(str, ours[split])) for split in ours} == {
        str(split): sorted(set(theirs[split])) for split in theirs
    }


CARDS: list[tuple[str, dict[str, list[str]]]] = [
    ("data_files: a.jsonl", {"train": ["a.jsonl"]}),
    ("data_files: '*.jsonl'", {"train": ["a.jsonl", "b.jsonl", "train.jsonl"]}),
    ("data_files: [a.jsonl, x/c.jsonl]", {"train": ["a.jsonl", "x/c.jsonl"]}),
    (
        "data_files: [{split: train, path: a.jsonl}, {split: extra, path: ['b*', x/*]}]",
        {"train": ["a.jsonl"], "extra": ["b.jsonl", "x/c.jsonl"]},
    ),
]


@pytest.mark.parametrize(("entry", "splits"), CARDS)
def test_the_card_of_a_folder_is_read_like_by_the_usual_loader(
    tmp_path: Path, entry: str, splits: dict[str, list[str]]
) -> None:
    folder = lay_out(tmp_path / "set", ["a.jsonl", "b.jsonl", "train.jsonl", "x/c.jsonl"])
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  {entry}\n---\n# A set\n")
    data_files = yaml.safe_load(entry)["data_files"]
    patterns = datasets.data_files.sanitize_patterns(data_files)
    for split, names in splits.items():
        assert read(folder, split)[0] == names
        files = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=str(folder))[split]
        assert sorted(str(Path(file).relative_to(folder)) for file in files) == names


SEVERAL = "configs:\n- config_name: main\n  data_files: a.jsonl\n- config_name: other\n  data_files: b.jsonl\n"


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (SEVERAL, "data: {card} describes several sets of files (main, other). Name one by data.subset."),
        ("configs: [{data_files: none.jsonl}]", 'data: {card} names the files "none.jsonl", which match none.'),
        ("configs: [{data_files: /etc/*}]", 'data: {card} names the files "/etc/*", which is no pattern below it.'),
        (
            "configs: [{data_files: {a: 1}}]",
            "data: {card} describes data_files that are no text and no list of split and path.",
        ),
    ],
)
def test_a_card_that_names_no_files_is_refused(tmp_path: Path, header: str, complaint: str) -> None:
    folder = lay_out(tmp_path / "set", ["a.jsonl", "b.jsonl"])
    (folder / "README.md").write_text(f"---\n{header}\n---\n")
    with pytest.raises(DataError) as error:
        read(folder)
    assert complaints(error) == [complaint.format(card=folder / "README.md")]


def test_of_several_sets_of_files_the_usual_one_is_read(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "set", ["a.jsonl", "b.jsonl"])
    for header in (SEVERAL.replace("other", "default"), SEVERAL.replace("other", "other\n  default: true")):
        (folder / "README.md").write_text(f"---\n{header}---\n")
        assert read(folder) == (
            ["b.jsonl"],
            [f"of {folder}, the split train is read (b.jsonl); not a.jsonl (of no split)."],
        )


@pytest.mark.parametrize(
    "header", ["a: [", "\x00", "a: &a [*a]", "configs: {}", "configs: [1]", "[" * 5000, "", "configs: [{}]"]
)
def test_any_header_of_a_card_is_read_or_refused(tmp_path: Path, header: str) -> None:
    folder = lay_out(tmp_path / "set", ["a.jsonl"])
    (folder / "README.md").write_text(f"---\n{header}\n---\n")
    try:
        found = str(read(folder)[0])
    except DataError as error:
        found = str(error)
    assert found == "['a.jsonl']" or found.startswith(f"data: the header of {folder}/README.md cannot be read (")


def test_test_rows_are_never_trained_on_without_a_word(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "set", ["train.jsonl", "test.jsonl", "README.md", "extra.jsonl"])
    prompts, notes = read(folder)
    assert prompts == ["train.jsonl"]
    assert notes == [
        f"of {folder}, the split train is read (train.jsonl); not test (test.jsonl), extra.jsonl (of no split)."
    ]


@pytest.mark.parametrize("split", ["test", "eval", "testing"])
def test_data_split_picks_by_any_of_its_names(tmp_path: Path, split: str) -> None:
    assert read(lay_out(tmp_path / "set", ["train.jsonl", "test.jsonl"]), split)[0] == ["test.jsonl"]


@pytest.mark.parametrize(
    ("names", "path", "split", "have"),
    [
        (["train.jsonl", "test.jsonl"], "", "nosuch", "test, train"),
        (["test.jsonl"], "", "train", "test"),
        (["a.jsonl"], "", "test", "train"),
        (["a.jsonl"], "a.jsonl", "test", "train"),
        (["test.jsonl"], "test.jsonl", "validation", "train, test"),
        (["train.jsonl", "test.jsonl"], "*.jsonl", "nosuch", "test, train"),
    ],
)
def test_a_split_that_is_not_there_is_refused(
    tmp_path: Path, names: list[str], path: str, split: str, have: str
) -> None:
    where = str(lay_out(tmp_path / "set", names) / path)
    with pytest.raises(DataError) as error:
        read(where, split)
    assert complaints(error) == [f'data.split: {where} has no split "{split}" (have {have}).']


@pytest.mark.parametrize(
    ("name", "is_named"),
    [
        ("Test.jsonl", True), ("testset.jsonl", True), ("my_TEST_2.jsonl", True), ("held-out.jsonl", True),
        ("holdout/x.jsonl", True), ("evalset-1.jsonl", True), ("devdata.jsonl", True), ("Validation.jsonl", True),
        ("contest.jsonl", False), ("devices.jsonl", False), ("latest.jsonl", False), ("evaluated.jsonl", False),
    ],
)  # fmt: skip
def test_files_that_may_hold_test_rows_by_their_names_are_named(tmp_path: Path, name: str, is_named: bool) -> None:
    folder = lay_out(tmp_path / "set", ["a.jsonl", name])
    prompts, notes = read(folder)
    assert sorted(map(str, prompts)) == sorted(["a.jsonl", name])
    said = f"{name} in {folder} may hold test rows by the name, and is read as training rows; name the files to read"
    assert [note.startswith(said) for note in notes] == [True] * is_named


def test_a_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "set", ["train.jsonl", "test.jsonl"])
    assert read(folder / "test.jsonl") == (["test.jsonl"], [])
    assert read(folder / "test.jsonl", "test") == (["test.jsonl"], [])


def test_a_glob_over_several_splits_reads_one_and_says_so(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "set", ["train.jsonl", "test.jsonl", "dev/x.jsonl"])
    prompts, notes = read(f"{folder}/*.jsonl")
    assert prompts == ["train.jsonl"]
    assert notes == [f"of {folder}/*.jsonl, the split train is read (train.jsonl); not test (test.jsonl)."]
    assert read(f"{folder}/te*.jsonl") == (["test.jsonl"], [])
    assert read(f"{folder}/dev/*.jsonl") == (["dev/x.jsonl"], [])


def test_all_reads_every_split(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "set", ["test.jsonl", "train.jsonl", "x.jsonl"])
    for path in (folder, f"{folder}/*.jsonl"):
        note = f"of {path}, every split is read (test.jsonl, train.jsonl); not x.jsonl (of no split)."
        assert read(path, "all") == (["test.jsonl", "train.jsonl"], [note])
    assert read(folder / "test.jsonl", "all")[0] == ["test.jsonl"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    names = ["data/train-00000-of-00003.jsonl", "data/train-00002-of-00003.jsonl", "data/test-00000-of-00001.jsonl"]
    folder = lay_out(tmp_path / "set", names)
    with pytest.raises(DataError) as error:
        read(folder)
    assert complaints(error) == [f"data: {folder} holds 2 of 3 files of train (no data/train-00001-of-00003.jsonl)."]


def test_a_file_named_for_two_splits_is_refused(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "set", ["train_test.jsonl", "dev.jsonl"])
    with pytest.raises(DataError) as error:
        read(folder)
    assert complaints(error) == [
        f"data: {folder}/train_test.jsonl is named for more than one split. Name the files in data.path."
    ]


def test_files_of_a_folder_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = lay_out(
        tmp_path / "set", ["a.jsonl", "b.tsv", "c/d.jsonl.zst", ".hidden.jsonl", "__x/e.jsonl", "notes.md"]
    )
    prompts, notes = read(folder)
    assert prompts == ["a.jsonl"]
    assert notes == [
        f"b.tsv, c/d.jsonl.zst in {folder}: this kind of file is not read (have .jsonl, .json, .csv, .parquet)."
    ]


def test_held_out_rows_come_from_the_validation_or_test_split(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "set", ["train.jsonl", "test.jsonl"])
    split = load_prompts(section(folder, eval_path=str(folder)), PLAIN, 100)
    assert [prompt.text for prompt in split.train] == ["train.jsonl"]
    assert [prompt.text for prompt in split.held_out] == ["test.jsonl"]
    lay_out(folder, ["dev.jsonl"])
    records = check_rows(section(folder, eval_path=str(folder)), RowKind.PROMPTS).records
    assert [record.prompt for record in records] == ["train.jsonl", "dev.jsonl"]
    with pytest.raises(DataError, match=r'data.eval_split: .* has no split "x" \(have '):
        check_rows(section(folder, eval_path=str(folder), eval_split="x"), RowKind.PROMPTS)
    assert held_out_split(DataSection(eval_split="test")).names == ("test",)


def test_saved_data_sets_are_read_by_split(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    parts = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    parts["test"].save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "both") == (["train"], [f"of {tmp_path}/both, the split train is read; not test."])
    assert read(tmp_path / "both", "test")[0] == ["test"]
    assert read(tmp_path / "one") == (["test"], [])
    assert read(tmp_path / "one", "all") == (["test"], [])
    assert read(tmp_path / "both", "all") == (["train", "test"], [])
    for folder, split, have in (("both", "x", "train, test"), ("one", "x", "train")):
        with pytest.raises(DataError) as error:
            read(tmp_path / folder, split)
        assert complaints(error) == [f'data.split: {tmp_path}/{folder} has no split "{split}" (have {have}).']
    assert place_of(str(tmp_path / "both")) is Place.SAVED


def test_whatever_the_library_raises_for_a_name_on_the_hub_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, subset: str | None, split: str) -> None:
        raise RuntimeError("Dataset scripts are not supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError) as error:
        read("owner/name")
    assert complaints(error) == [
        "data: owner/name matches no file, and no such data set can be loaded (Dataset scripts are not supported, but "
        "found x.py)."
    ]


def test_a_name_on_the_hub_is_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of held-out rows the first split that is there."""

    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        if split != "test":
            raise ValueError(f"Unknown split {split}. Should be one of ['test'].")
        return datasets.Dataset.from_list([{"prompt": name}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    problems = Problems(0)
    rows = read_rows("owner/name", held_out_split(DataSection()), problems)
    assert [(row.where, row.values["prompt"]) for row in rows] == [("owner/name:1", "owner/name")]
    with pytest.raises(DataError) as error:
        read("owner/name")
    assert complaints(error) == ["data: owner/name: Unknown split train. Should be one of ['test']."]


def test_a_damaged_saved_folder_is_named(tmp_path: Path) -> None:
    for name, content in (("a", b""), ("b", b"[]"), ("c", b'{"_data_files": 7}'), ("d", b"{}")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "state.json").write_bytes(content)
        (folder / "dataset_info.json").write_bytes(content)
        with pytest.raises(DataError, match=f"^data: {folder} is a damaged datasets folder"):
            read(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5000), st.integers(0, 8))
def test_a_saved_folder_with_one_bit_turned_or_an_end_cut_off(tmp_path: Path, place: int, bit: int) -> None:
    """Arrow reads outside of a damaged file where it is not checked first."""
    datasets.disable_progress_bars()
    folder = tmp_path / "saved"
    if not folder.exists():
        rows = [{"prompt": "é" * n, "m": [{"role": "user", "n": n}]} for n in range(20)]
        datasets.Dataset.from_list(rows).save_to_disk(str(folder))
        shutil.copytree(folder, tmp_path / "whole")
    content = bytearray((tmp_path / "whole" / "data-00000-of-00001.arrow").read_bytes())
    place %= len(content)
    if bit < 8:
        content[place] ^= 1 << bit
    (folder / "data-00000-of-00001.arrow").write_bytes(content if bit < 8 else content[:place])
    problems = Problems(100)
    read_rows(str(folder), training_split(DataSection()), problems)
    try:
        problems.settle()
        said = "data: fine"
    except DataError as error:
        said = str(error)
    assert said.startswith("data: ")


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("owner/name", Place.HUB), ("name", Place.HUB), ("no/such/file", Place.FILES), ("rows.jsonl", Place.FILES),
        ("a*", Place.FILES), ("/nothing", Place.FILES), ("rows.csv.gz", Place.FILES),
    ],
)  # fmt: skip
def test_a_path_that_is_not_there_may_be_a_name_on_the_hub(path: str, place: Place) -> None:
    assert place_of(path) is place
