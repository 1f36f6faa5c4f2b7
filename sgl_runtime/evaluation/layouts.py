"""The benchmarks' own files, as they lie on disk after download, turned into rows of the schema of `data`.

A row is a dict with ``image`` or ``images``, ``question``, ``answers``, ``id``, and what else the metric
needs. Where each layout was looked up is said at its function. Nothing is downloaded, nothing is written.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_runtime.errors import DataError
from sgl_runtime.evaluation.readers import (
    Entries,
    Row,
    is_base64,
    jsonl_entries,
    jsonl_row,
    listed,
    mapped,
    parquet_entries,
    read_json,
    read_plain_pickle,
    tsv_records,
    without_nulls,
)
from sgl_runtime.images import cut


@dataclass(frozen=True)
class Layout:
    """How one kind of data set lies on disk.

    Attributes
    ----------
    metric : what it is scored with, a name of `metrics.METRICS`
    files : what is looked for, for messages
    name : matches the name of its file
    entries : reads the file
    row : one entry as a row; whatever goes wrong in it makes the entry a bad row
    keys : what an entry has, by which a file of another name is known
    folders : where images are looked for, beside the file and one directory up
    """

    metric: str
    files: str
    name: re.Pattern[str]
    entries: Callable[[Path], Entries]
    row: Callable[[Any], Row]
    keys: frozenset[str] = frozenset()
    folders: tuple[str, ...] = ("",)


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Return a question with its options under it, a letter before each (LLaVA, docs/Evaluation.md)."""
    options = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
    return "\n".join([question, *options])


def _textvqa_row(entry: Row) -> Row:
    """TextVQA_0.5.1_val.json; train and validation images are in train_images (textvqa.org/dataset)."""
    return {
        "id": entry["question_id"],
        "image": f"{entry['image_id']}.jpg",
        "question": entry["question"],
        "answers": entry.get("answers", []),
    }


def _chartqa_row(entry: Row) -> Row:
    """test/test_human.json, test/test_augmented.json beside test/png (github.com/vis-nlp/ChartQA, README)."""
    return {"image": entry["imgname"], "question": entry["query"], "answers": entry["label"]}


def _docvqa_row(entry: Row) -> Row:
    """val_v1.0.json or val_v1.0_withQT.json of rrc.cvc.uab.es, ch=17, task 1; images are documents/*.png."""
    return {
        "id": entry["questionId"],
        "image": Path(entry["image"]).name,
        "question": entry["question"],
        "answers": entry.get("answers", []),
    }


def _infovqa_row(entry: Row) -> Row:
    """infographicsVQA_val_v1.0_withQT.json of rrc.cvc.uab.es, ch=17, task 3."""
    return {
        "id": entry["questionId"],
        "image": entry["image_local_name"],
        "question": entry["question"],
        "answers": entry.get("answers", []),
    }


_VQA_QUESTIONS = re.compile(r"(v2_)?OpenEnded_mscoco_(\w+?)_questions\.json")


def _vqav2_entries(path: Path) -> Entries:
    """v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json, visualqa.org."""
    name = _VQA_QUESTIONS.fullmatch(path.name)
    if name is None:
        raise DataError(f"{path} must have the name that it had: {LAYOUTS['vqav2'].files}.")
    beside = path.with_name(f"{name[1] or ''}mscoco_{name[2]}_annotations.json")
    if not beside.is_file():
        raise DataError(f"The answers to {path.name} are missing: {beside}. Put that file beside it.")
    answers = {entry["question_id"]: entry["answers"] for _, entry in listed(beside, "annotations")}
    return ((at, (name[2], entry, answers)) for at, entry in listed(path, "questions"))


def _vqav2_row(entry: tuple[str, Row, dict[int, list[Row]]]) -> Row:
    subset, question, answers = entry
    return {
        "id": question["question_id"],
        "image": f"COCO_{subset}_{question['image_id']:012d}.jpg",
        "question": question["question"],
        "answers": [given["answer"] for given in answers[question["question_id"]]],
    }


def _seed_entries(path: Path) -> Entries:
    """SEED-Bench.json, dimensions 1 to 9: images (github.com/AILab-CVC/SEED-Bench, DATASET.md, SEED-Bench-1).

    Video questions are left out, as in the SEED-Image of InternVL and LLaVA.
    """
    for at, question in listed(path, "questions"):
        if not isinstance(question, dict) or question.get("data_type") != "video":
            yield at, question


def _seed_row(entry: Row) -> Row:
    return {
        "id": entry["question_id"],
        "image": entry["data_id"],
        "question": entry["question"],
        "choices": [entry[f"choice_{letter}"] for letter in "abcd"],
        "answers": entry["answer"],
        "category": str(entry["question_type_id"]),
    }


def _gqa_row(entry: tuple[str, Row]) -> Row:
    """testdev_balanced_questions.json, ids to questions (cs.stanford.edu/people/dorarad/gqa)."""
    number, question = entry
    return {
        "id": number,
        "image": f"{question['imageId']}.jpg",
        "question": question["question"],
        "answers": question.get("answer", []),
    }


def _mmvet_row(entry: tuple[str, Row]) -> Row:
    """mm-vet.json, ids v1_0, v1_1, ... to questions, beside images (github.com/yuweihao/MM-Vet)."""
    number, question = entry
    return {
        "id": number,
        "image": question["imagename"],
        "question": question["question"],
        "answers": question.get("answer", []),
    }


def _mmbench_entries(path: Path) -> Entries:
    """mmbench_dev_20230712.tsv, MMBench_DEV_EN.tsv, ...; images are a column of base64.

    An image of at most 64 letters is the index of the row that holds it (VLMEvalKit,
    vlmeval/dataset/image_base.py, 0507265). Images are not kept in memory: `embedded_image` reads one from
    where its record lies in the file.
    """
    records = tsv_records(path)
    header = next(records, (0, 0, 0, []))[3]
    if not {"index", "question", "image", "A", "B"} <= set(header):
        raise DataError(
            f"{path} must have the columns index, question, image, A and B, got {cut(str(header))}."
        )
    rows: list[tuple[int, Row]] = []
    places: dict[str, str] = {}
    for line, begin, end, fields in records:
        row = dict(zip(header, fields, strict=False))
        if len(row.get("image", "")) > 64:
            places[row["index"]] = f"{path}#bytes={begin}-{end}"
            row["image"] = row["index"] if is_base64(row["image"]) else ""
        rows.append((line, row))
    return ((line, (row, places)) for line, row in rows)


def _mmbench_row(entry: tuple[Row, dict[str, str]]) -> Row:
    row, places = entry
    if row["image"] not in places:
        raise ValueError("its image is neither base64 nor the index of a row that has one")
    answer = row.get("answer")
    return {
        "id": row["index"],
        "image": places[row["image"]],
        "question": "\n".join(part for part in (row.get("hint"), row["question"]) if part),
        "choices": [row[letter] for letter in "ABCDE" if row.get(letter)],
        "answers": answer if answer else [],
        "category": row.get("category", ""),
        "circular": int(row["index"]) % 1_000_000,  # rotations of a question add millions to its index
    }


_MME = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


def _mme_folder(path: Path) -> Path | None:
    release = "MME_Benchmark_release_version"
    for inner in ("", "MME_Benchmark", release, f"{release}/MME_Benchmark"):
        if any((path / inner / category).is_dir() for category in _MME):
            return path / inner
    return None


def _mme_entries(path: Path) -> Entries:
    """MME_Benchmark_release_version: a folder per category, of images and, of the same stem, texts.

    Or each kind in a folder of its own, images and questions_answers_YN. A text has two lines: question,
    tab, Yes or No (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation).
    """
    at = 0
    for category in _MME:
        folder = path / category
        apart = (folder / "questions_answers_YN").is_dir()
        images, texts = (folder / "images", folder / "questions_answers_YN") if apart else (folder, folder)
        pictures = {image.stem: image for image in images.glob("*") if image.suffix.lower() != ".txt"}
        for text in sorted(texts.glob("*.txt")):
            for number, line in enumerate(text.read_text(encoding="utf-8-sig").splitlines(), 1):
                at += 1
                yield at, (category, text, number, line, pictures.get(text.stem))


def _mme_row(entry: tuple[str, Path, int, str, Path | None]) -> Row:
    category, text, number, line, image = entry
    if image is None:
        raise ValueError(f"{text} has no image of its name")
    question, tab, answer = line.rpartition("\t")
    if not tab:
        raise ValueError(
            f"line {number} of {text} must be a question, a tab, and Yes or No, got {cut(repr(line))}"
        )
    return {
        "id": f"{category}/{text.stem}/{number}",
        "image": str(image.absolute()),
        "question": question.removesuffix("Please answer yes or no.").rstrip(),  # the metric's suffix asks
        "answers": answer,
        "category": category,
    }


def _refcoco_entries(path: Path) -> Entries:
    """refs(unc).p beside instances.json (github.com/lichengunc/refer, refer.py), all splits but train.

    Or the converted refcoco_val.jsonl that InternVL evaluates on (internvl_chat/eval/refcoco/README.md).
    """
    if path.suffix != ".p":
        yield from jsonl_entries(path)
        return
    beside = path.with_name("instances.json")
    if not beside.is_file():
        raise DataError(f"The boxes of {path.name} are missing: {beside}. Put that file beside it.")
    instances = read_json(beside)
    boxes = {one["id"]: one["bbox"] for one in instances["annotations"]}
    images = {one["id"]: one for one in instances["images"]}
    refs = read_plain_pickle(path)
    asked = ((ref, sentence) for ref in refs if ref["split"] != "train" for sentence in ref["sentences"])
    for at, (ref, sentence) in enumerate(asked, 1):
        yield at, (ref, sentence, boxes, images)


def _refcoco_row(entry: Any) -> Row:
    ask = "Please provide the bounding box coordinate of the region this sentence describes: "
    if isinstance(entry, bytes):
        row = jsonl_row(entry)
        size = {"width": row["width"], "height": row["height"]}
        return {"image": Path(row["image"]).name, "question": ask + row["sent"], "box": row["bbox"], **size}
    ref, sentence, boxes, images = entry
    x, y, width, height = boxes[ref["ann_id"]]
    image = images[ref["image_id"]]
    return {
        "id": sentence["sent_id"],
        "image": image["file_name"],
        "question": ask + sentence["sent"],
        "box": [x, y, x + width, y + height],
        "width": image["width"],
        "height": image["height"],
        "category": ref["split"],
    }


def _named(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def _entries_at(*keys: str) -> Callable[[Path], Entries]:
    return lambda path: listed(path, *keys)


LAYOUTS: dict[str, Layout] = {
    "textvqa": Layout(
        "vqa",
        "TextVQA_*.json",
        _named(r"TextVQA_\d.*\.json"),
        _entries_at("data"),
        _textvqa_row,
        frozenset({"question_id", "image_id", "question"}),
        ("train_images", "test_images", ""),
    ),
    "chartqa": Layout(
        "relaxed",
        "test_human.json or test_augmented.json",
        _named(r"(train|val|test)_(human|augmented)\.json"),
        _entries_at(),
        _chartqa_row,
        frozenset({"imgname", "query", "label"}),
        ("png", ""),
    ),
    "docvqa": Layout(
        "anls",
        "val_v1.0.json or val_v1.0_withQT.json",
        _named(r"(train|val|test)_v1\.0(_withQT)?\.json"),
        _entries_at("data"),
        _docvqa_row,
        frozenset({"questionId", "docId", "image", "question"}),
        ("documents", "spdocvqa_images", "images", ""),
    ),
    "infovqa": Layout(
        "anls",
        "infographicsVQA_*.json",
        _named(r"infographics?VQA_.*\.json"),
        _entries_at("data"),
        _infovqa_row,
        frozenset({"questionId", "image_local_name", "question"}),
        ("infographicsvqa_images", "images", ""),
    ),
    "gqa": Layout(
        "gqa",
        "testdev_balanced_questions.json",
        _named(r".*_(balanced|all)_questions\.json"),
        mapped,
        _gqa_row,
        frozenset({"imageId", "question"}),
        ("images", ""),
    ),
    "vqav2": Layout(
        "vqa",
        "v2_OpenEnded_mscoco_*_questions.json",
        _VQA_QUESTIONS,
        _vqav2_entries,
        _vqav2_row,
        folders=("val2014", "train2014", "test2015", ""),
    ),
    "seed": Layout(
        "multiple_choice",
        "SEED-Bench.json",
        _named(r"SEED-Bench.*\.json"),
        _seed_entries,
        _seed_row,
        frozenset({"data_id", "choice_a", "question"}),
        ("SEED-Bench-image", ""),
    ),
    "mmbench": Layout(
        "multiple_choice", "*.tsv", _named(r".*\.tsv"), _mmbench_entries, _mmbench_row, folders=("",)
    ),
    "mmvet": Layout(
        "judge",
        "mm-vet.json",
        _named(r"mm-vet\.json"),
        mapped,
        _mmvet_row,
        frozenset({"imagename", "question"}),
        ("images", ""),
    ),
    "mme": Layout(
        "mme", "a folder per category (existence, count, ...)", _named("(?!)"), _mme_entries, _mme_row
    ),
    "refcoco": Layout(
        "box",
        "refs(*).p or refcoco*.jsonl",
        _named(r"refs\(.*\)\.p|refcoco[+g]*_.*\.jsonl"),
        _refcoco_entries,
        _refcoco_row,
        folders=("train2014", "images/train2014", "images/mscoco/images/train2014", ""),
    ),
    "jsonl": Layout("exact", "*.jsonl", _named(r".*\.jsonl"), jsonl_entries, jsonl_row),
    "parquet": Layout("exact", "*.parquet", _named(r".*\.parquet"), parquet_entries, without_nulls),
}


def find(path: Path, layout: str) -> tuple[str, Path]:
    """Return which layout ``path`` has and its file, or for MME its folder.

    Parameters
    ----------
    path
        A file, or the directory that holds it.
    layout
        A name of `LAYOUTS`; "auto" goes by the file's name, then by the keys of a JSON file's first entry.

    Raises
    ------
    DataError
        Nothing, or more than one thing, was found; the message names what was looked for.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise DataError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if not path.exists():
        raise DataError(f"There is no {path}.")
    wanted = LAYOUTS if layout == "auto" else {layout: LAYOUTS[layout]}
    if path.is_dir():
        folder = _mme_folder(path) if "mme" in wanted else None
        found = (
            [_by_name(file, wanted) for file in sorted(path.iterdir())]
            if folder is None
            else [("mme", folder)]
        )
    else:
        found = [(layout, path) if layout != "auto" else _by_name(path, wanted) or _by_keys(path)]
    candidates = [one for one in found if one is not None]
    if len(candidates) > 1:
        names = ", ".join(f"{file.name} ({name})" for name, file in candidates)
        raise DataError(
            f"{path} holds more than one data set: {names}. Give the path of the file that you mean."
        )
    if not candidates:
        files = "; ".join(f"{name}: {one.files}" for name, one in wanted.items())
        raise DataError(
            f"{path} is no data set that is known. Looked for {files}. Give layout=... to say which it is."
        )
    return candidates[0]


def _by_name(file: Path, wanted: dict[str, Layout]) -> tuple[str, Path] | None:
    return next(((name, file) for name, one in wanted.items() if one.name.fullmatch(file.name)), None)


def _by_keys(file: Path) -> tuple[str, Path] | None:
    if file.suffix != ".json":
        return None
    for name, one in LAYOUTS.items():
        try:
            _, entry = next(iter(one.entries(file))) if one.keys else (0, {})
        except (DataError, StopIteration):
            continue
        fields = entry[1] if isinstance(entry, tuple) else entry
        if one.keys and isinstance(fields, dict) and one.keys <= fields.keys():
            return name, file
    return None
