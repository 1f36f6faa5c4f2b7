"""The benchmarks' files as they lie on disk: small copies of their structure, found, read and scored."""

import base64
import io
import json
import pickle
import re
from pathlib import Path

import pytest
from PIL import Image

from sgl_runtime.errors import DataError
from sgl_runtime.evaluation.data import load, open_source
from sgl_runtime.evaluation.layouts import LAYOUTS
from sgl_runtime.evaluation.metrics import METRICS


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(path)
    return str(path)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def textvqa(root):
    picture(root / "train_images" / "003a8ae2ef43b901.jpg")
    entry = {
        "question_id": 34602,
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "answers": ["dakota"] * 9 + ["clos culombu"],
        "set_name": "val",
    }
    put(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [entry]})
    return {"id": "34602", "image": "train_images/003a8ae2ef43b901.jpg", "prediction": "Dakota."}


def chartqa(root):
    picture(root / "png" / "41699051005347.png")
    entry = {"imgname": "41699051005347.png", "query": "How many food items?", "label": "14"}
    put(root / "test_human.json", [entry])
    return {"id": "line-1", "image": "png/41699051005347.png", "prediction": "14.5"}


def docvqa(root):
    picture(root / "documents" / "pybv0228_81.png")
    entry = {
        "questionId": 49153,
        "question": "What is the actual value per 1000?",
        "image": "documents/pybv0228_81.png",
        "docId": 14465,
        "answers": ["0.28"],
        "data_split": "val",
    }
    put(root / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [entry]})
    return {"id": "49153", "image": "documents/pybv0228_81.png", "prediction": "0.28"}


def infovqa(root):
    picture(root / "infographicsvqa_images" / "20471.jpeg")
    entry = {
        "questionId": 98313,
        "question": "Which platform has more users?",
        "image_local_name": "20471.jpeg",
        "answers": ["pinterest", "Pinterest app"],
    }
    put(root / "infographicsVQA_val_v1.0_withQT.json", {"data": [entry]})
    return {"id": "98313", "image": "infographicsvqa_images/20471.jpeg", "prediction": "PINTEREST"}


def gqa(root):
    picture(root / "images" / "n161313.jpg")
    question = {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "isBalanced": True}
    put(root / "testdev_balanced_questions.json", {"201307251": question})
    return {"id": "201307251", "image": "images/n161313.jpg", "prediction": "No."}


def vqav2(root):
    picture(root / "val2014" / "COCO_val2014_000000262148.jpg")
    question = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
    answers = [{"answer": "down", "answer_id": number} for number in range(1, 11)]
    annotation = {"question_id": 262148000, "image_id": 262148, "answers": answers}
    put(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [question]})
    put(root / "v2_mscoco_val2014_annotations.json", {"annotations": [annotation]})
    return {"id": "262148000", "image": "val2014/COCO_val2014_000000262148.jpg", "prediction": "down"}


def seed(root):
    picture(root / "SEED-Bench-image" / "a.png")
    (root / "SEED-Bench-image" / "a.png").rename(root / "SEED-Bench-image" / "1454426_2591111986")
    question = {
        "answer": "A",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
        "data_id": "1454426_2591111986",
        "data_type": "image",
        "question": "How many towels are in the image?",
        "question_id": "101669",
        "question_type_id": 5,
    }
    video = question | {"data_type": "video", "data_id": "94328.webm", "question_id": "v1738"}
    put(
        root / "SEED-Bench.json", {"questions": [question, video], "question_type": {"Instances Counting": 5}}
    )
    return {"id": "101669", "image": "SEED-Bench-image/1454426_2591111986", "prediction": "(A) One"}


def mmvet(root):
    picture(root / "images" / "v1_0.png")
    question = {
        "imagename": "v1_0.png",
        "question": "What is x?",
        "answer": "-1<AND>-5",
        "capability": ["ocr"],
    }
    put(root / "mm-vet.json", {"v1_0": question})
    return {"id": "v1_0", "image": "images/v1_0.png"}


def refcoco(root):
    picture(root / "train2014" / "COCO_train2014_000000581857.jpg")
    ref = {
        "ref_id": 0,
        "ann_id": 1719310,
        "image_id": 581857,
        "split": "testA",
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "sentences": [{"sent_id": 7, "sent": "lady in blue", "raw": "lady in blue", "tokens": []}],
    }
    (root / "refs(unc).p").write_bytes(pickle.dumps([ref, ref | {"split": "train"}], protocol=0))
    instances = {
        "images": [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 40, "height": 20}],
        "annotations": [{"id": 1719310, "image_id": 581857, "bbox": [10, 5, 20, 10]}],
    }
    put(root / "instances.json", instances)
    image = "train2014/COCO_train2014_000000581857.jpg"
    return {"id": "7", "image": image, "prediction": "[[250, 250, 750, 750]]"}


MAKERS = {
    "textvqa": (textvqa, "vqa"),
    "chartqa": (chartqa, "relaxed"),
    "docvqa": (docvqa, "anls"),
    "infovqa": (infovqa, "anls"),
    "gqa": (gqa, "gqa"),
    "vqav2": (vqav2, "vqa"),
    "seed": (seed, "multiple_choice"),
    "mmvet": (mmvet, "judge"),
    "refcoco": (refcoco, "box"),
}


@pytest.mark.parametrize("layout", MAKERS)
def test_a_layout_is_found_read_and_scored(tmp_path, layout):
    make, metric = MAKERS[layout]
    expected = make(tmp_path)
    found = load(tmp_path)
    assert found == load(tmp_path, layout=layout)
    assert found.metric == metric
    [example] = found.examples
    assert example.id == expected["id"]
    assert example.images == (str(tmp_path / expected["image"]),)
    if "prediction" in expected:
        assert METRICS[metric].score(expected["prediction"], example) == 1
        assert METRICS[metric].score("nothing like it", example) == 0


JSON_KEYS = [name for name, one in LAYOUTS.items() if one.keys]


@pytest.mark.parametrize("layout", JSON_KEYS)
def test_a_renamed_json_file_is_known_by_its_keys(tmp_path, layout):
    make, metric = MAKERS[layout]
    make(tmp_path)
    [file] = [file for file in tmp_path.iterdir() if file.suffix == ".json"]
    file.rename(tmp_path / "questions.json")
    found = load(tmp_path / "questions.json")
    assert (found.metric, len(found.examples)) == (metric, 1)
    assert found.examples == load(tmp_path / "questions.json", layout=layout).examples


def test_what_the_questions_are(tmp_path):
    seed(tmp_path)
    [example] = load(tmp_path).examples
    assert example.question == "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four"
    assert example.extra == {"choices": ["One", "Two", "Three", "Four"], "category": "5"}


def test_images_one_directory_up_or_under_image_root(tmp_path):
    gqa(tmp_path)
    inner = tmp_path / "questions1.2" / "testdev_balanced_questions.json"
    inner.parent.mkdir()
    (tmp_path / "testdev_balanced_questions.json").rename(inner)
    image = (str(tmp_path / "images" / "n161313.jpg"),)
    assert load(inner).examples[0].images == image
    far = put(tmp_path / "x" / "y" / inner.name, inner.read_text())
    with pytest.raises(DataError, match=r"n161313\.jpg is not in"):
        load(far)
    assert load(far, image_root=tmp_path).examples[0].images == image
    assert load(far, image_root=tmp_path / "images").examples[0].images == image


def test_broken_entries_have_their_place(tmp_path):
    textvqa(tmp_path)
    file = tmp_path / "TextVQA_0.5.1_val.json"
    [entry] = json.loads(file.read_text())["data"]
    lacking = {key: value for key, value in entry.items() if key != "image_id"}
    put(file, {"data": [entry, lacking, "text", entry | {"question_id": 1, "answers": []}]})
    found = load(file, skip_bad=True)
    assert [(bad.line, bad.reason) for bad in found.bad[::2]] == [
        (2, "'image_id' is missing"),
        (4, "it has no answer"),
    ]
    assert found.bad[1].line == 3


def test_a_layouts_own_group_is_not_ours(tmp_path):
    textvqa(tmp_path)
    file = tmp_path / "TextVQA_0.5.1_val.json"
    [entry] = json.loads(file.read_text())["data"]
    put(file, {"data": [entry | {"group": ["of", "theirs"], "choices": "none"}]})
    assert load(file).examples[0].extra == {}
    header = ["index", "question", "A", "B", "answer", "group", "image"]
    record = ["1", "What colour?", "red", "blue", "A", "7", encoded("red")]
    tsv = put(tmp_path / "mmbench.tsv", "\n".join("\t".join(one) for one in [header, record]))
    assert "group" not in load(tsv).examples[0].extra


def test_files_of_another_structure(tmp_path):
    for name, content in (
        ("TextVQA_0.5.1_val.json", "{"),
        ("SEED-Bench.json", []),
        ("mm-vet.json", []),
        ("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": []}),
        ("refs(unc).p", "x"),
        ("odd.json", {"no": "questions"}),
        ("test_human.json", "[" * 100_000),
        ("deep.json", "[" * 100_000),
    ):
        with pytest.raises(DataError, match=r"Is it a file|cannot|can be read|missing|no data set"):
            load(put(tmp_path / name, content))


def test_annotations_of_another_structure(tmp_path):
    vqav2(tmp_path)
    put(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [{"id": 1}]})
    with pytest.raises(DataError, match="not what vqav2 files are like"):
        load(tmp_path)


def test_a_pickle_runs_no_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return (put, (tmp_path / "harm", "done"))

    refcoco(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Harm()]))
    with pytest.raises(DataError, match="plain values"):
        load(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_a_pickle_of_python_2(tmp_path):
    """Protocol 2 with byte strings, as the refs files are."""
    refcoco(tmp_path)
    [ref, _] = pickle.loads((tmp_path / "refs(unc).p").read_bytes())
    text = pickle.dumps([ref], protocol=2).replace(b"X\x05\x00\x00\x00testA", b"U\x05testA")
    assert b"U\x05testA" in text
    (tmp_path / "refs(unc).p").write_bytes(text)
    [example] = load(tmp_path).examples
    assert example.extra == {"box": [10, 5, 30, 15], "width": 40, "height": 20, "category": "testA"}


def test_refcoco_as_converted_for_internvl(tmp_path):
    picture(tmp_path / "train2014" / "COCO_train2014_000000581857.jpg")
    line = {
        "image": "data/coco/train2014/COCO_train2014_000000581857.jpg",
        "sent": "lady in blue",
        "bbox": [10.0, 5.0, 30.0, 15.0],
        "width": 40,
        "height": 20,
    }
    put(tmp_path / "refcoco+_testA.jsonl", json.dumps(line) + "\n" + json.dumps({"sent": "x"}) + "\n")
    found = load(tmp_path, skip_bad=True)
    assert [bad.line for bad in found.bad] == [2]
    [example] = found.examples
    assert example.question.endswith("this sentence describes: lady in blue")
    assert METRICS["box"].score("<box>[[250,250,750,750]]</box>", example) == 1
    assert METRICS["box"].score("<box>[[0,0,300,300]]</box>", example) == 0


def mme(root):
    for folder, images, texts in (("count", "", ""), ("artwork", "images", "questions_answers_YN")):
        picture(root / folder / images / "one.jpg")
        lines = "Is it one? Please answer yes or no.\tYes\nIs it two? Please answer yes or no.\tNo\n"
        put(root / folder / texts / "one.txt", lines)
    put(root / "eval_tool" / "readme.txt", "no category")


@pytest.mark.parametrize("inside", ["", "MME_Benchmark_release_version", "MME_Benchmark"])
def test_mme(tmp_path, inside):
    root = tmp_path / inside
    mme(root)
    found = load(tmp_path)
    assert found == load(tmp_path, layout="mme")
    assert found.metric == "mme"
    assert [example.id for example in found.examples] == [
        "count/one/1",
        "count/one/2",
        "artwork/one/1",
        "artwork/one/2",
    ]
    assert [example.question for example in found.examples] == ["Is it one?", "Is it two?"] * 2
    assert found.examples[0].images == (str(root / "count" / "one.jpg"),)
    assert found.examples[2].images == (str(root / "artwork" / "images" / "one.jpg"),)
    scores = [METRICS["mme"].score("Yes", example) for example in found.examples]
    summary = METRICS["mme"].summary(scores, found.examples)
    assert summary == {"count": 50, "artwork": 50, "perception": 100, "cognition": 0, "total": 100}


def test_mme_without_an_image_or_a_tab(tmp_path):
    mme(tmp_path)
    put(tmp_path / "count" / "two.txt", "Is it?\tYes\n")
    put(tmp_path / "artwork" / "questions_answers_YN" / "one.txt", "Is it?\tYes\nno tab\n")
    found = load(tmp_path, skip_bad=True)
    assert [bad.line for bad in found.bad] == [3, 5]
    assert "two.txt has no image" in found.bad[0].reason
    assert "line 2 of" in found.bad[1].reason


def encoded(colour):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_mmbench_images_stay_in_the_file(tmp_path):
    red, blue = encoded("red"), encoded("blue")
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    records = [
        ["241", "What colour?", "", "red", "blue", "", "", "A", "color", red],
        ["252", '"Which\ncolour?"', "Grüße", "red", "blue", "green", "", "B", "color", blue],
        ["1000241", "What colour?", "", "blue", "red", "", "", "B", "color", "241"],
        ["253", "Which?", "", "red", "blue", "", "", "A", "color", "999"],
        ["254", "Which?", "", "red", "blue", "", "", "A", "color", "*" * 100],
        ["255", "Which?", "", "red", "blue", "", "", "", "color", red],
    ]
    file = put(tmp_path / "mmbench_dev_20230712.tsv", "\n".join("\t".join(one) for one in [header, *records]))
    before = sorted(tmp_path.iterdir())
    found = load(tmp_path, skip_bad=True)
    assert found.metric == "multiple_choice"
    assert [example.id for example in found.examples] == ["241", "252", "1000241"]
    assert [example.question for example in found.examples] == [
        "What colour?\nA. red\nB. blue",
        "Grüße\nWhich\ncolour?\nA. red\nB. blue\nC. green",
        "What colour?\nA. blue\nB. red",
    ]
    assert [(bad.line, bad.reason) for bad in found.bad] == [
        (6, "its image is neither base64 nor the index of a row that has one"),
        (7, "its image is neither base64 nor the index of a row that has one"),
        (8, "it has no answer"),
    ]
    opened = [open_source(example.images[0]) for example in found.examples]
    assert opened == [base64.b64decode(red), base64.b64decode(blue), base64.b64decode(red)]
    assert found.examples[0].images == found.examples[2].images  # one picture, one group
    assert found.examples[0].images[0].startswith(f"{file}#bytes=")
    assert sorted(tmp_path.iterdir()) == before
    summary = METRICS["multiple_choice"].summary([1, 1, 0], found.examples)
    assert summary == {"color": pytest.approx(2 / 3), "circular accuracy": 0.5}


def test_a_tsv_of_something_else(tmp_path):
    with pytest.raises(DataError, match="must have the columns index, question, image"):
        load(put(tmp_path / "x.tsv", "a\tb\n1\t2\n"))


def test_two_splits_must_be_told_apart(tmp_path):
    chartqa(tmp_path)
    (tmp_path / "test_augmented.json").write_bytes((tmp_path / "test_human.json").read_bytes())
    with pytest.raises(DataError, match=r"test_augmented\.json \(chartqa\), test_human\.json \(chartqa\)"):
        load(tmp_path)
    assert load(tmp_path / "test_human.json").name == "test_human"


def test_an_explicit_layout_says_what_it_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"Looked for textvqa: TextVQA_\*\.json\."):
        load(tmp_path, layout="textvqa")
    with pytest.raises(DataError, match="a folder per category"):
        load(tmp_path, layout="mme")


def test_the_page_names_every_layout_and_metric():
    page = (Path(__file__).parents[2] / "docs" / "evaluation_data.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE) == [
        (name, one.metric) for name, one in LAYOUTS.items()
    ]
    assert re.findall(r"^\* `(\w+)`:", page, re.MULTILINE) == list(METRICS)


def test_every_layout_has_a_metric_and_a_test():
    assert {one.metric for one in LAYOUTS.values()} <= METRICS.keys()
    assert {*MAKERS, "mme", "mmbench", "jsonl", "parquet"} == LAYOUTS.keys()
