"""Labels as people have them: none lost, no mixture without a word, names kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from torchvision.datasets import ImageFolder

from ibq_scale.cli.main import main
from ibq_scale.data.adopt import adopt_tars
from ibq_scale.data.describe import as_text, describe
from ibq_scale.data.labels import Labels, Odd, Tally, decide_labels, label_of_text, label_of_value
from ibq_scale.data.look import look_only
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.prepare import prepare_images
from ibq_scale.data.tars import Naming
from ibq_scale.errors import UserError
from tests.data.wild import Items, as_json, jpeg, labels_of, put, samples_of, tar

CAT_DOG_OWL = {"cat": 1, "dog": 1, "owl": 1}
NUMBERS = {"0": 1, "1": 1, "2": 1}


def _each(member: Callable[[int], tuple[str, bytes]], count: int = 3) -> list[tuple[str, bytes]]:
    return [
        item for i in range(count) for item in ((f"{i:04d}.jpg", jpeg(i)), (f"{i:04d}.{member(i)[0]}", member(i)[1]))
    ]


def _named(i: int) -> str:
    return ("dog", "cat", "owl")[i]


FORMS: dict[str, tuple[Items, dict[str, int]]] = {
    "words in cls": (_each(lambda i: ("cls", _named(i).encode())), CAT_DOG_OWL),
    "words of several": (_each(lambda i: ("cls", b"great white shark\n")), {"great white shark": 3}),
    "words beyond ascii": (_each(lambda i: ("cls", "Kätzchen 猫".encode())), {"Kätzchen 猫": 3}),
    "numbers with a new line": (_each(lambda i: ("cls", f" {i}\r\n".encode())), NUMBERS),
    "numbers with a mark of order": (_each(lambda i: ("cls", b"\xef\xbb\xbf%d" % i)), NUMBERS),
    "numbers with zeros": (_each(lambda i: ("cls", f"{i:03d}".encode())), NUMBERS),
    "floats in cls": (_each(lambda i: ("cls", f"{i}.0".encode())), NUMBERS),
    "cls.txt": (_each(lambda i: ("cls.txt", str(i).encode())), NUMBERS),
    "index": (_each(lambda i: ("index", str(i).encode())), NUMBERS),
    "label": (_each(lambda i: ("label", str(i).encode())), NUMBERS),
    "CLS": (_each(lambda i: ("CLS", str(i).encode())), NUMBERS),
    "image.cls": (_each(lambda i: ("image.cls", str(i).encode())), NUMBERS),
    "label in json": (_each(lambda i: ("json", as_json(label=i))), NUMBERS),
    "text in json": (_each(lambda i: ("json", as_json(label=str(i)))), NUMBERS),
    "float in json": (_each(lambda i: ("json", as_json(label=float(i)))), NUMBERS),
    "word in json": (_each(lambda i: ("json", as_json(label=_named(i)))), CAT_DOG_OWL),
    "class_id": (_each(lambda i: ("json", as_json(class_id=i, width=3))), NUMBERS),
    "class_name": (_each(lambda i: ("json", as_json(class_name=_named(i)))), CAT_DOG_OWL),
    "number and name": (_each(lambda i: ("json", as_json(label=i, class_name=_named(i)))), CAT_DOG_OWL),
    "one-hot": (_each(lambda i: ("json", as_json(label=[int(j == i) for j in range(3)]))), NUMBERS),
    "list of one": (_each(lambda i: ("json", as_json(label=[i]))), NUMBERS),
    "yes and no": (_each(lambda i: ("json", as_json(label=i > 0))), {"false": 1, "true": 2}),
    "meta.json": (_each(lambda i: ("meta.json", as_json(label=i))), NUMBERS),
    "null, then a key": (_each(lambda i: ("json", as_json(label=None, class_id=i))), NUMBERS),
    "from 1": (_each(lambda i: ("cls", str(i + 1).encode())), {"1": 1, "2": 1, "3": 1}),
    "sparse": (_each(lambda i: ("cls", str(i * 500_000).encode())), {"0": 1, "500000": 1, "1000000": 1}),
    "a hole": (_each(lambda i: ("cls", str((0, 1, 3)[i]).encode())), {"0": 1, "1": 1, "2": 0, "3": 1}),
    "none anywhere": (_each(lambda i: ("txt", b"a caption")), {"unlabelled": 3}),
    "-1 everywhere": (_each(lambda i: ("cls", b"-1")), {"unlabelled": 3}),
    "folders": ([(f"{c}/{i}.jpg", jpeg(i)) for c in ("cat", "dog") for i in (0, 1)], {"cat": 2, "dog": 2}),
    "folders below": ([(f"./train/{c}/{i}.jpg", jpeg(i)) for c in ("10", "9") for i in (0, 1)], {"10": 2, "9": 2}),
    "one folder": ([(f"train/{i}.jpg", jpeg(i)) for i in (0, 1)], {"unlabelled": 2}),
    "labels after all pictures": (
        [(f"{i}.jpg", jpeg(i)) for i in range(3)] + [(f"{i}.cls", str(i).encode()) for i in range(3)],
        NUMBERS,
    ),
    "labels before all pictures": (
        [(f"{i}.cls", _named(i).encode()) for i in range(3)] + [(f"{i}.jpg", jpeg(i)) for i in range(3)],
        CAT_DOG_OWL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_labels_in_a_tar(tmp_path: Path, form: str) -> None:
    items, expected = FORMS[form]
    tar(tmp_path / "in/a.tar", items)
    report = prepare_images(tmp_path / "in", str(tmp_path / "to"))
    assert labels_of(tmp_path / "to") == expected
    assert report.rejected == 0
    # The same of tars that stay as they are.
    adopt_tars(str(tmp_path / "in"))
    assert [s[1:] for s in samples_of(tmp_path / "in")] == [s[1:] for s in samples_of(tmp_path / "to")]
    # And a look says the same before.
    seen = look_only(str(tmp_path / "in"))
    assert (seen.classes, seen.taken) == (report.seen.classes, report.seen.taken)


def test_a_second_reader_finds_the_same_labels(tmp_path: Path) -> None:
    items, _ = FORMS["words in cls"]
    tar(tmp_path / "in/a.tar", items)
    prepare_images(tmp_path / "in", str(tmp_path / "to"))
    classes = load_manifest(str(tmp_path / "to"), "images").classes
    theirs = [(s["cls"].decode(), s["jpg"]) for s in wds.WebDataset(str(tmp_path / "in/a.tar"), shardshuffle=False)]
    ours = wds.WebDataset(str(tmp_path / "to/images-000000.tar"), shardshuffle=False)
    assert sorted((classes[int(s["cls"])], s["jpg"]) for s in ours) == sorted(theirs)


MIXTURES: dict[str, tuple[Items, str]] = {
    "the first without": (
        [("0.jpg", jpeg(0)), *_each(lambda i: ("cls", b"1"))[2:], ("9.jpg", jpeg(3)), ("9.cls", b"1")],
        r"3 have a label .* 1 have none \(a.tar/0\)",
    ),
    "half without": (
        [*[(f"a{i}.jpg", jpeg(i)) for i in range(3)], *_each(lambda i: ("cls", b"1"))],
        r"3 have a label .* 3 have none",
    ),
    "half -1": (_each(lambda i: ("cls", str(i % 2 - 1).encode()), 4), r"2 have a label .* 2 have none"),
    "words and numbers": (_each(lambda i: ("cls", (b"cat", b"3", b"4")[i])), "2 .*and some are names, 1 .*cat"),
    "several labels": (_each(lambda i: ("cls", b"4 2")), "no label is one class"),
    "fractions": (_each(lambda i: ("json", as_json(label=0.25 * (i + 1)))), "no label is one class"),
    "dots in names": (
        [x for i in range(5) for x in ((f"photo_v1.2_{i}.jpg", jpeg(i)), (f"photo_v1.2_{i}.cls", b"0"))],
        r"1 keys have several pictures .*--key stem",
    ),
}


@pytest.mark.parametrize("form", MIXTURES)
def test_mixtures_are_refused_and_both_halves_named(tmp_path: Path, form: str) -> None:
    items, words = MIXTURES[form]
    tar(tmp_path / "in/a.tar", items)
    with pytest.raises(UserError, match=words) as told:
        prepare_images(tmp_path / "in", str(tmp_path / "to"))
    assert len(str(told.value).splitlines()) == 1
    assert not (tmp_path / "to").exists()
    with pytest.raises(UserError, match=words):
        adopt_tars(str(tmp_path / "in"))


def test_a_few_without_a_label_are_left_out_and_told(tmp_path: Path) -> None:
    tar(tmp_path / "in/a.tar", [("first.jpg", jpeg(50)), *_each(lambda i: ("cls", str(i % 2).encode()), 20)])
    seen = prepare_images(tmp_path / "in", str(tmp_path / "to")).seen
    assert (seen.pictures, seen.taken) == (21, 20)
    assert seen.left_out["has no label, unlike the others"].first == ("a.tar/first",)


CHOICES: dict[str, tuple[Items, Naming, dict[str, int]]] = {
    "another key": (
        _each(lambda i: ("json", as_json(label=0, breed=_named(i)))), Naming(label="breed"), CAT_DOG_OWL,
    ),
    "a nested key": (
        _each(lambda i: ("json", as_json(info={"class": _named(i)}))), Naming(label="info.class"), CAT_DOG_OWL,
    ),
    "a member": (
        _each(lambda i: ("kind.txt", _named(i).encode())), Naming(label="kind.txt"), CAT_DOG_OWL,
    ),
    "no labels": (
        _each(lambda i: ("cls", (b"cat", b"3", b"4")[i])), Naming(label="none"), {"unlabelled": 3},
    ),
    "folders": (
        [x for c in "ab" for i in (0, 1) for x in ((f"{c}/{i}.jpg", jpeg(i)), (f"{c}/{i}.json", as_json(label=1)))],
        Naming(label="folder"), {"a": 2, "b": 2},
    ),
    "stems": (
        [x for i in range(3) for x in ((f"v1.2_{i}.jpg", jpeg(i)), (f"v1.2_{i}.cls", str(i).encode()))],
        Naming(stem=True), NUMBERS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_a_user_says_what_is_the_label(tmp_path: Path, choice: str) -> None:
    items, naming, expected = CHOICES[choice]
    tar(tmp_path / "in/a.tar", items)
    prepare_images(tmp_path / "in", str(tmp_path / "to"), naming=naming)
    assert labels_of(tmp_path / "to") == expected
    adopt_tars(str(tmp_path / "in"), naming=naming)
    assert labels_of(tmp_path / "in") == expected


def test_a_key_that_nothing_has_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "in/a.tar", _each(lambda i: ("cls", b"1")))
    with pytest.raises(UserError, match="not one sample has a label under 'breed'"):
        prepare_images(tmp_path / "in", str(tmp_path / "to"), naming=Naming(label="breed"))


def test_which_of_several_pictures_is_taken(tmp_path: Path) -> None:
    def pictures(*names: str) -> Items:
        return [(f"{i}.{name}", jpeg(10 * i + j)) for i in range(2) for j, name in enumerate(names)]

    for number, (names, naming, taken) in enumerate(
        (
            (("segmentation.jpg", "image.jpg"), None, 1),
            (("jpg", "mask.jpg"), None, 0),
            (("mask.jpg", "jpeg.jpg", "depth.jpg"), None, 1),
            (("left.jpg", "right.jpg"), Naming(picture="right.jpg"), 1),
        )
    ):
        source, to = tmp_path / f"{number}/in", tmp_path / f"{number}/to"
        tar(source / "a.tar", pictures(*names))
        report = prepare_images(source, str(to), naming=naming)
        assert [data for _, _, data in samples_of(to)] == [jpeg(taken), jpeg(10 + taken)], names
        # The others are told.
        assert report.seen.notes["other pictures beside a sample's own"].count == 2 * (len(names) - 1)
    tar(tmp_path / "in/a.tar", pictures("left.jpg", "right.jpg"))
    with pytest.raises(UserError, match=r"several pictures .*--picture"):
        prepare_images(tmp_path / "in", str(tmp_path / "to"))


def _folders(root: Path) -> None:
    put(root, "cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg", "zebra/0.jpg", "zebra/1.jpg")


FOLDERS: dict[str, tuple[list[str], str]] = {
    "a folder of tables": (["csv/labels.csv"], "folders without a picture"),
    "an empty class": (["elk/.keep"], "hidden files"),
    "a class of empty files": (["elk/0.jpg"], "folders without a picture"),
    "a class of pages": (["elk/0.jpg", "elk/1.png"], "folders without a picture"),
    "thumbnails": (["cat/@eaDir/0.jpg", "@eaDir/0.jpg"], "files of other programs"),
    "macOS": (["__MACOSX/cat/0.jpg", "cat/._0.jpg"], "hidden files"),
    "checkpoints of notebooks": ([".ipynb_checkpoints/0.jpg"], "hidden files"),
    "an archive": (["cats.zip"], "archives"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_no_classes_move_no_label(tmp_path: Path, case: str) -> None:
    names, reason = FOLDERS[case]
    _folders(tmp_path / "in")
    put(tmp_path / "in", *names, data=b"<html>404" if case == "a class of pages" else b"")
    report = prepare_images(tmp_path / "in", str(tmp_path / "to"))
    assert labels_of(tmp_path / "to") == {"cat": 2, "dog": 2, "zebra": 2}
    assert reason in report.seen.left_out
    assert any(reason in line for line in report.seen.lines())


REFUSED: dict[str, tuple[list[str], str]] = {
    "a tar left beside": (["cat/0.jpg", "dog/0.jpg", "cat.tar"], r"1 tars \(cat.tar\) and 2 pictures"),
    "splits": (["train/cat/0.jpg", "val/cat/0.jpg"], r"splits train, val .*in/train"),
    "flat splits": (["train/0.jpg", "test/0.jpg"], "splits test, train"),
    "one split": (["Train/cat/0.jpg", "Train/dog/0.jpg"], "splits Train .*in/Train"),
    "one level too high": (["images/cat/0.jpg", "images/dog/0.jpg"], r"below images/: give .*in/images"),
    "pictures beside folders": (["0.jpg", "1.jpg", "cat/0.jpg"], r"2 \(0.jpg, 1.jpg\) pictures outside .* 1 files"),
    "splits of tars": (
        ["train-0.tar", "train-1.tar", "val-0.tar"],
        r"splits train, validation \(train-0.tar, val-0.tar\)",
    ),
    "splits in folders of tars": (["train/0.tar", "test/0.tar"], "splits test, train"),
    "compressed tars": (["a.tar.gz", "b.tar.gz"], "unpack"),
    "a compressed tar beside one": (["a.tar", "b.tar.gz"], r"1 tars \(a.tar\) and 1 compressed"),
    "parquet beside pictures": (["a.parquet", "cat/0.jpg"], "1 parquet files .* and 1 pictures"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_mean_two_things_is_refused(tmp_path: Path, case: str) -> None:
    names, words = REFUSED[case]
    put(tmp_path / "in", *names)
    with pytest.raises(UserError, match=words) as told:
        prepare_images(tmp_path / "in", str(tmp_path / "to"))
    assert len(str(told.value).splitlines()) == 1


def test_class_folders_are_those_of_torchvision(tmp_path: Path) -> None:
    put(tmp_path / "in", "b/0.jpg", "a/deep/1.jpg", "10/2.JPEG", "9/3.png", "B/4.jpg")
    prepare_images(tmp_path / "in", str(tmp_path / "to"))
    theirs = ImageFolder(str(tmp_path / "in"))
    ours = [(name, label) for name, label, _ in samples_of(tmp_path / "to")]
    assert load_manifest(str(tmp_path / "to"), "images").classes == tuple(theirs.classes)
    named = [(str(Path(path).relative_to(tmp_path / "in")), theirs.classes[label]) for path, label in theirs.samples]
    assert ours == sorted(named)


TABLES: dict[str, tuple[str, str, str | None]] = {
    "the Hub's csv": ("metadata.csv", "file_name,label\n0.jpg,dog\n1.jpg,cat\n2.jpg,owl\n", None),
    "the Hub's jsonl": (
        "metadata.jsonl",
        "".join(json.dumps({"file_name": f"{i}.jpg", "label": _named(i)}) + "\n" for i in range(3)),
        None,
    ),
    "ids without an ending": ("labels.csv", "id,breed\n0,dog\n1,cat\n2,owl\n", "breed"),
    "semicolons": ("labels.csv", "image;x;breed\n0.jpg;1;dog\n1.jpg;1;cat\n2.jpg;1;owl\n", "breed"),
    "tabs and quotes": ("l.tsv", 'path\tbreed\n"./0.jpg"\tdog\n1.jpg\tcat\n2.jpg\towl\n', "breed"),
}


@pytest.mark.parametrize("form", TABLES)
def test_labels_in_a_table_beside_the_pictures(tmp_path: Path, form: str) -> None:
    name, text, column = TABLES[form]
    put(tmp_path / "in", "0.jpg", "1.jpg", "2.jpg")
    (tmp_path / "in" / name).write_text(text, encoding="utf-8-sig")
    assert prepare_images(tmp_path / "in", str(tmp_path / "to"), naming=Naming(label=column)).rejected == 0
    assert [s[:2] for s in samples_of(tmp_path / "to")] == [("0.jpg", "dog"), ("1.jpg", "cat"), ("2.jpg", "owl")]
    with pytest.raises(UserError, match=r"--label race: no file.* there are "):
        prepare_images(tmp_path / "in", str(tmp_path / "to2"), naming=Naming(label="race"))


@pytest.mark.parametrize(
    ("columns", "label", "expected"),
    [
        ({"label": ["dog", "cat", "owl"]}, None, CAT_DOG_OWL),
        ({"class_id": [0, 1, 2]}, None, NUMBERS),
        ({"label": [0.0, 1.0, 2.0]}, None, NUMBERS),
        ({"label": [0, 0, 0], "breed": ["dog", "cat", "owl"]}, "breed", CAT_DOG_OWL),
        ({"label": [0, 1, 2]}, "none", {"unlabelled": 3}),
        ({"text": ["a", "b", "c"]}, None, {"unlabelled": 3}),
    ],
)
def test_labels_in_parquet(
    tmp_path: Path, columns: dict[str, Any], label: str | None, expected: dict[str, int]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"image": [jpeg(i) for i in range(3)], **columns})
    parquet.write_table(table, tmp_path / "a.parquet")
    prepare_images(tmp_path / "a.parquet", str(tmp_path / "to"), naming=Naming(label=label))
    assert labels_of(tmp_path / "to") == expected


def test_parquet_files_of_other_classes_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    for file, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        features = json.dumps({"info": {"features": {"label": {"names": names}}}})
        table = pa.table({"image": [jpeg()], "label": [0]}).replace_schema_metadata({"huggingface": features})
        parquet.write_table(table, tmp_path / f"{file}.parquet")
    with pytest.raises(UserError, match=r"a.parquet has labels .*cat, dog.* b.parquet has labels .*dog, cat"):
        prepare_images(tmp_path, str(tmp_path.parent / "to-parquet"))


def test_held_out_pictures_take_the_numbers_of_the_training(tmp_path: Path) -> None:
    _folders(tmp_path / "train")
    put(tmp_path / "val", "zebra/0.jpg", "cat/0.jpg")
    prepare_images(tmp_path / "train", str(tmp_path / "to"))
    prepare_images(tmp_path / "val", str(tmp_path / "to-val"), classes=str(tmp_path / "to"))
    assert labels_of(tmp_path / "to-val") == {"cat": 1, "dog": 0, "zebra": 1}
    put(tmp_path / "val", "elk/0.jpg")
    with pytest.raises(UserError, match="class 'elk' is none of its 3 classes"):
        prepare_images(tmp_path / "val", str(tmp_path / "to-2"), classes=str(tmp_path / "to"))


def test_the_names_of_a_prepared_set_are_kept_when_it_is_prepared_again(tmp_path: Path) -> None:
    _folders(tmp_path / "in")
    prepare_images(tmp_path / "in", str(tmp_path / "to"))
    prepare_images(tmp_path / "to", str(tmp_path / "again"), size=16)
    assert labels_of(tmp_path / "again") == {"cat": 2, "dog": 2, "zebra": 2}


def test_what_was_seen_is_told_and_stays_in_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _folders(tmp_path / "in")
    put(tmp_path / "in", "csv/labels.csv", "cat/notes.txt", "cat/cut.jpg", data=jpeg()[:100])
    words = ["prepare", "images", str(tmp_path / "in"), "--to", str(tmp_path / "to")]
    assert main([*words, "--dry-run"]) == 0
    looked = capsys.readouterr().out
    assert not (tmp_path / "to").exists()
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "cat: 2, dog: 2, zebra: 2" in told
    assert "folders without a picture: 1 (csv/)" in told
    assert "folders without a picture: 1 (csv/)" in looked
    assert len(looked.splitlines()) <= 10
    seen = load_manifest(str(tmp_path / "to"), "images").seen
    assert seen is not None
    assert (seen.files, seen.taken, seen.formats, seen.modes) == (9, 6, {"JPEG": 6}, {"RGB": 6})
    assert "\n".join(seen.lines()) in told
    assert "\n".join(seen.lines()) in as_text(describe(str(tmp_path / "to")))


def test_what_is_a_label_and_what_is_none() -> None:
    for text, found in {
        "3": 3,
        " 3.0 ": 3,
        "-1": None,
        "": None,
        "cat": "cat",
        "1e3": Odd("1e3"),
        "1,2": Odd("1,2"),
    }.items():
        assert label_of_text(text) == found, text
    for value, found in ((3.5, Odd("3.5")), (float("nan"), None), ({}, Odd("{}")), ([1, 1], Odd("[1, 1]"))):
        assert label_of_value(value) == found, value
    assert label_of_text(b"\xff\xfe") == Odd("b'\\xff\\xfe'")


def test_where_a_look_at_all_is_a_download_no_label_is_lost_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in object storage: captions are believed after the first, labels are looked at whole."""
    monkeypatch.setattr("ibq_scale.data.folder.LocalStore.local", False)
    monkeypatch.setattr("ibq_scale.data.survey.SAMPLES_LOOKED_AT", 2)
    captions = _each(lambda i: ("txt", b"a caption"), 4)
    tar(tmp_path / "in/a.tar", [*captions, ("9.jpg", jpeg()), ("9.cls", b"1")])
    report = prepare_images(tmp_path / "in", str(tmp_path / "to"))
    assert (report.samples, report.rejected, report.seen.pictures) == (4, 1, 4)
    assert "has a label, unlike those looked at first" in (tmp_path / "to/rejects.jsonl").read_text()
    assert prepare_images(tmp_path / "in", str(tmp_path / "none"), naming=Naming(label="none")).samples == 5
    tar(tmp_path / "labelled/a.tar", [*_each(lambda i: ("cls", str(i).encode()), 4)])
    prepare_images(tmp_path / "labelled", str(tmp_path / "to-2"))
    assert labels_of(tmp_path / "to-2") == {str(i): 1 for i in range(4)}


def test_identifiers_are_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibq_scale.data.labels.MOST_CLASSES", 3)
    tally = Tally()
    for i in range(3):
        tally.add(str(i), f"id-{i}")
    with pytest.raises(UserError, match="identifiers and no classes"):
        tally.add("3", "id-3")
    assert decide_labels(Tally()) == Labels()
