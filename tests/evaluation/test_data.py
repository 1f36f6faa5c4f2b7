"""JSONL and Parquet: the schema, broken rows, samples."""

import json
import os

import pytest
from PIL import Image

from sgl_runtime.errors import ConfigError, DataError
from sgl_runtime.evaluation.data import BadRow, load, open_source


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    return tmp_path


def write(folder, *rows, name="set.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def row(**more):
    return {"image": "a.png", "question": "What?", "answer": "x"} | more


def test_the_schema(folder):
    path = write(
        folder,
        {
            "id": "one",
            "images": ["a.png", "b.png"],
            "question": "Which?",
            "answers": ["x", "y"],
            "category": "c",
        },
        "",
        {"question_id": 7, "image": str(folder / "b.png"), "question": "Wie groß?", "answer": 3.5},
        row(),
    )
    found = load(path)
    assert (found.name, found.metric, found.bad) == ("set", "exact", ())
    first, second, third = found.examples
    assert first.images == (str(folder / "a.png"), str(folder / "b.png"))
    assert (first.id, first.question, first.answers) == ("one", "Which?", ("x", "y"))
    assert first.extra == {"category": "c"}
    assert (second.id, second.answers, second.question) == ("7", ("3.5",), "Wie groß?")
    assert second.images == (str(folder / "b.png"),)
    assert third.id == "line-4"
    assert open_source(first.images[0]) == first.images[0]


def test_choices_are_asked_with(folder):
    [example] = load(write(folder, row(answer="B", choices=["x", "y"])), metric="multiple_choice").examples
    assert example.question == "What?\nA. x\nB. y"
    assert example.extra == {"choices": ["x", "y"]}


def test_a_metric_is_chosen(folder):
    assert load(write(folder, row()), metric="vqa").metric == "vqa"
    assert load(write(folder, row(box=[0, 0, 1, 1], width=4, height=3)), metric="box").metric == "box"
    with pytest.raises(ConfigError, match="exact, vqa, anls"):
        load(write(folder, row()), metric="bleu")


def test_choices_in_every_row_choose_the_metric(folder):
    lettered, plain = row(answer="B", choices=["x", "y"]), row(choices=["x", "y"])
    assert load(write(folder, lettered, plain)).metric == "multiple_choice"
    assert load(write(folder, lettered, plain), metric="exact").metric == "exact"
    assert load(write(folder, lettered, row())).metric == "exact"
    assert load(write(folder, lettered, row() | {"choices": None})).metric == "exact"
    found = load(write(folder, lettered, row(question=""), row(choices=["p", "q"])), skip_bad=True)
    assert found.metric == "multiple_choice"
    assert [(bad.line, bad.reason) for bad in found.bad] == [
        (2, "question must be a text, got ''"),
        (3, "for multiple_choice the answer must be one of the 2 choices or its letter, got 'x'"),
    ]


@pytest.mark.parametrize("metric", ["exact", "vqa", "multiple_choice", None])
@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ([str(number) for number in range(27)], "got 27: ['0', '1', '2'"),
        (["x"], "got 1: ['x']"),
        ([], "got 0: []"),
        ("x or y", "got 'x or y'"),
        (["x", 2], "got 2: ['x', 2]"),
    ],
)
def test_choices_that_cannot_be_asked(folder, metric, choices, says):
    path = write(folder, row(choices=["x", "y"]), row(choices=choices))
    [bad] = load(path, metric=metric, skip_bad=True).bad
    assert bad.line == 2
    assert bad.reason.startswith(f"choices must be a list of 2 to 26 texts, {says}")
    alphabet = [f"{number}." for number in range(25)] + ["x"]
    [example] = load(write(folder, row(choices=alphabet)), metric=metric).examples
    assert example.question.endswith("\nZ. x")


def test_groups_are_texts(folder):
    path = write(folder, row(group="scene 1"), row(group=7), row(group=None), row())
    extras = [example.extra for example in load(path).examples]
    assert extras == [{"group": "scene 1"}, {"group": "7"}, {}, {}]
    for wrong in ([1], {"a": 1}, True, "", float("nan")):
        [bad] = load(write(folder, row(), row(group=wrong)), skip_bad=True).bad
        assert (bad.line, bad.reason) == (2, f"group must hold texts or numbers, got {wrong!r}")


LONE = "\ud83d"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", LONE),
        ("image", f"{LONE}.png"),
        ("question", f"What {LONE}?"),
        ("answer", LONE),
        ("answer", ["x", LONE]),
        ("category", LONE),
        ("group", LONE),
        ("choices", ["x", LONE]),
        ("notes", {"by": [{"name": LONE}]}),
        ("notes", {"by": {LONE: 1}}),
        (LONE, 1),
    ],
)
def test_half_a_character(folder, column, value):
    """JSON can name one half of a pair of UTF-16; no file of results could hold it."""
    path = write(folder, row(id="first"), {**row(), column: value}, row(id="last", question="\U0001f600?"))
    found = load(path, skip_bad=True)
    assert [example.id for example in found.examples] == ["first", "last"]
    [bad] = found.bad
    assert bad.line == 2
    assert bad.reason.startswith(f"{column!r} holds half a character")
    assert bad.reason.encode()


@pytest.mark.parametrize(
    ("deep", "reason"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"image": "a.png", "notes": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        (row(notes=json.loads("[" * 60 + "]" * 60)), "'notes' is nested more than 50 deep"),
    ],
)
def test_deep_rows(folder, deep, reason):
    path = write(folder, row(id="first"), deep, row(id="last"))
    found = load(path, skip_bad=True)
    assert [example.id for example in found.examples] == ["first", "last"]
    assert reason in found.bad[0].reason
    [example] = load(write(folder, row(notes=json.loads("[" * 50 + "]" * 50)))).examples
    assert json.dumps(example.extra["notes"]) == "[" * 50 + "]" * 50


@pytest.mark.parametrize(
    "wrong",
    [
        row(image="data:image/png;base64," + "A" * 5000),
        row(image=["A" * 5000]),
        row(image={"bytes": "A" * 5000}),
        row(question=["A" * 5000]),
        row(answer=[["A" * 5000]]),
        row(answer="A" * 5000, choices=["x", "y"]),
        row(choices="A" * 5000),
        row(id={"A" * 5000: 1}),
    ],
)
def test_values_in_errors_are_cut(folder, wrong):
    """Else an image that is given in base64 fills the terminal."""
    [bad] = load(write(folder, row(choices=["x", "y"]), wrong), metric="multiple_choice", skip_bad=True).bad
    assert "A" * 20 in bad.reason
    assert "A" * 81 not in bad.reason
    assert "…" in bad.reason


def test_images_start_at_image_root(folder):
    (folder / "pictures").mkdir()
    os.rename(folder / "a.png", folder / "pictures" / "a.png")
    path = write(folder, row())
    with pytest.raises(DataError, match=r"a\.png is not in"):
        load(path)
    [example] = load(path, image_root=folder / "pictures").examples
    assert example.images == (str(folder / "pictures" / "a.png"),)
    with pytest.raises(DataError, match="not a directory"):
        load(path, image_root=folder / "nowhere")


def test_paths_may_be_relative(folder, monkeypatch):
    write(folder, row())
    monkeypatch.chdir(folder)
    assert load("set.jsonl").examples[0].images == (str(folder / "a.png"),)
    assert load(".").examples[0].images == (str(folder / "a.png"),)


BROKEN = [
    ('{"image": "a.png"', "Expecting"),
    ("[1]", "must be an object, got list"),
    (row(image="gone.png"), "gone.png is not in"),
    (row(image="https://x.org/a.png"), "is not in"),
    (row(image={"bytes": "", "path": None}), "path of a file"),
    (row(image=None), "no image"),
    (row(images=["b.png"]), "both images and image"),
    (row(question=" "), "question must be a text"),
    (row(question=None), "question must be a text"),
    (row(answer=None), "no answer"),
    (row(answer=[]), "no answer"),
    (row(answer=["x", True]), "answers must hold texts or numbers"),
    (row(answer={"text": "x"}), "answers must hold texts or numbers"),
    (row(id=[1]), "id must hold"),
    ({"image": "a.png", "question": "What?", "answer": "x", "id": "first"}, "id 'first' is that of line 1"),
]


@pytest.mark.parametrize(("broken", "reason"), BROKEN)
def test_broken_rows(folder, broken, reason):
    path = write(folder, row(id="first"), broken, row(id="last"))
    with pytest.raises(DataError, match="1 of 3 rows are broken") as raised:
        load(path)
    assert "line 2: " in str(raised.value)
    assert reason in str(raised.value)
    found = load(path, skip_bad=True)
    assert [example.id for example in found.examples] == ["first", "last"]
    assert [bad.line for bad in found.bad] == [2]
    assert reason in found.bad[0].reason


def test_an_error_lists_ten(folder):
    path = write(folder, row(), *[row(question="")] * 12)
    with pytest.raises(DataError, match="12 of 13 rows are broken") as raised:
        load(path)
    assert str(raised.value).count("\n  line ") == 10
    assert "  and 2 more" in str(raised.value)
    assert load(path, skip_bad=True).bad[0] == BadRow(2, "question must be a text, got ''")


def test_no_usable_row(folder):
    with pytest.raises(DataError, match="No row can be used"):
        load(write(folder, row(question="")), skip_bad=True)
    with pytest.raises(DataError, match="has no rows"):
        load(write(folder, ""))


def test_bytes_that_are_no_text(folder):
    path = folder / "set.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row()).encode() + b'\n{"question": "\xff"}\n')
    found = load(path, skip_bad=True)
    assert [example.id for example in found.examples] == ["line-1"]
    assert "can't decode" in found.bad[0].reason


def test_limit_takes_the_first_or_draws(folder):
    path = write(folder, *[row(id=number) for number in range(50)])
    assert [one.id for one in load(path, limit=3).examples] == ["0", "1", "2"]
    drawn = [int(one.id) for one in load(path, limit=10, seed=1).examples]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn != list(range(10))
    assert drawn == [int(one.id) for one in load(path, limit=10, seed=1).examples]
    assert drawn != [int(one.id) for one in load(path, limit=10, seed=2).examples]
    assert len(load(path, limit=99, seed=1).examples) == 50
    with pytest.raises(ConfigError, match="at least 1"):
        load(path, limit=0)


def test_bad_rows_are_found_beyond_the_limit(folder):
    with pytest.raises(DataError, match="line 2"):
        load(write(folder, row(), row(question="")), limit=1)


def test_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow, of the extra eval")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "images": [["a.png"], ["a.png", "b.png"], ["gone.png"]],
        "question": ["One?", "Two?", "Three?"],
        "answers": [["x"], ["y", "z"], ["w"]],
        "category": [None, "c", "c"],
    }
    parquet.write_table(pyarrow.table(columns), folder / "set.parquet")
    found = load(folder / "set.parquet", skip_bad=True)
    assert [example.images for example in found.examples] == [
        (str(folder / "a.png"),),
        (str(folder / "a.png"), str(folder / "b.png")),
    ]
    assert [example.answers for example in found.examples] == [("x",), ("y", "z")]
    assert [example.extra for example in found.examples] == [{}, {"category": "c"}]
    assert [bad.line for bad in found.bad] == [3]
    assert load(folder, skip_bad=True).examples == found.examples
    damaged = bytearray((folder / "set.parquet").read_bytes())
    damaged[4:40] = b"\xff" * 36  # the first page's header; the file's own is at its end
    (folder / "damaged.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match=r"damaged\.parquet is not a Parquet file .* Write or download it"):
        load(folder / "damaged.parquet")
    (folder / "broken.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="not a Parquet file"):
        load(folder / "broken.parquet")


def test_what_is_no_data_set(folder):
    with pytest.raises(DataError, match="There is no"):
        load(folder / "gone.jsonl")
    with pytest.raises(DataError, match=r"Looked for textvqa: TextVQA_\*\.json; .* jsonl: \*\.jsonl"):
        load(folder)
    with pytest.raises(DataError, match="layout must be auto or one of textvqa"):
        load(folder, layout="coco")
    write(folder, row(), name="one.jsonl")
    write(folder, row(), name="two.jsonl")
    with pytest.raises(DataError, match=r"one\.jsonl \(jsonl\), two\.jsonl \(jsonl\)"):
        load(folder)
