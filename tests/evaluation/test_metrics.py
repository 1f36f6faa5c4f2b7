"""Metrics against published worked examples, and where answers are empty, foreign, or oddly written."""

import sys

import pytest

from sgl_runtime.errors import ConfigError, DataError
from sgl_runtime.evaluation.data import Example
from sgl_runtime.evaluation.metrics import (
    METRICS,
    chosen_option,
    intersection_over_union,
    normalize_answer,
    parse_box,
    yes_or_no,
)


def example(*answers, images=("image.png",), **extra):
    return Example("1", images, "What?", answers, extra)


def score(metric, prediction, *answers, **extra):
    return METRICS[metric].score(prediction, example(*answers, **extra))


# pix2struct/metrics_test.py, test_pix2struct_metrics: predictions, targets, and its metrics over them.
PIX2STRUCT = [
    ("abc", "abc"),
    ("abc", "Abc"),
    ("Abc", "abc"),
    ("100%", "96%"),
    ("100%", "94%"),
    ("100%", "0.96"),
    ("100%", "0.94"),
    ("Don't", "Won't"),
]


@pytest.mark.parametrize(("metric", "published"), [("anls", 47.5), ("relaxed", 62.5)])
def test_pix2structs_worked_examples(metric, published):
    scores = [score(metric, prediction, target) for prediction, target in PIX2STRUCT]
    assert 100 * sum(scores) / len(scores) == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize(
    ("prediction", "published"),
    [("The Coca", 0), ("CocaCola", 0.89), ("Coca cola", 1), ("Cola", 0), ("Cat", 0)],
)
def test_anls_example_of_the_robust_reading_competition(prediction, published):
    """Rrc.cvc.uab.es, ch=11, tasks; the table also stands in the README of github.com/shunk031/ANLS."""
    assert score("anls", prediction, "Coca Cola", "Coca Cola Company") == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("", ("x",), 0),
        ("ab", ("ac",), 0.5),  # exactly the threshold counts
        ("abc", ("ade",), 0),  # a third does not
        ("  A  B ", ("a b",), 1),
        ("cafe\u0301", ("café",), 1),
        ("東京都", ("東京",), 2 / 3),
        ("42.", ("nothing", "42"), 2 / 3),
    ],
)
def test_anls_edges(prediction, answers, expected):
    assert score("anls", prediction, *answers) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("answer", "published"),
    [("two", "2"), ("a building", "building"), ("snow, mountain", "snow mountain"), ("isnt", "isn't")],
)
def test_vqa_normalisation_as_mmf_tests_it(answer, published):
    """facebookresearch/mmf, tests/datasets/test_processors.py, test_evalai_answer_processor."""
    assert normalize_answer(answer) == published


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", ""),
        ("The", ""),
        ("Yes.", "yes"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("u.s.a.", "usa"),
        ("two-story", "2 story"),
        ("well - lit", "well lit"),
        ("re-do - it", "redo it"),  # a mark that touches a space somewhere goes without a trace everywhere
        ("None\n", "0"),
        ("ten\tmen", "10 men"),
        ("couldntve", "couldntve"),  # both apostrophes are missing: it is not in the table
        ("couldnt've", "couldn't've"),
        ("Yall'll", "y'all'll"),
        ("ow's'at", "'ow's'at"),
        ("she's", "she's"),
        ("what!", "what"),
        ("Ä, Ö", "ä ö"),
    ],
)
def test_vqa_normalisation(answer, expected):
    assert normalize_answer(answer) == expected


@pytest.mark.parametrize(("matching", "published"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_over_ten_annotators(matching, published):
    """One to four matches: get_score in hengyuan-hu/bottom-up-attention-vqa, tools/compute_softscore.py."""
    answers = ["two"] * matching + [f"other {number}" for number in range(10 - matching)]
    assert score("vqa", "2", *answers) == pytest.approx(published, rel=1e-12)


def test_vqa_accuracy_is_the_mean_over_leaving_one_out():
    answers = ["a", "cat", "Cat", "the cat", "dog", "dogs", "cat.", "bird"]
    for prediction in ("cat", "Dog", "", "horse"):
        clean = [normalize_answer(answer) for answer in answers]
        accuracies = [
            min((clean[:left] + clean[left + 1 :]).count(normalize_answer(prediction)) / 3, 1)
            for left in range(len(clean))
        ]
        mean = sum(accuracies) / len(accuracies)
        assert score("vqa", prediction, *answers) == pytest.approx(mean, rel=1e-12, abs=1e-15)


def test_vqa_accuracy_of_few_answers_takes_any():
    assert score("vqa", "Yes!", "yes") == 1
    assert score("vqa", "no", "yes", "maybe", "no") == 1
    assert score("vqa", "no", "yes") == 0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("9.5", ("10",), 1),
        ("9.49", ("10",), 0),
        ("-10", ("10",), 0),
        ("45%", ("45",), 0),  # a percent sign is a division by 100
        ("45", ("45%",), 0),
        ("0.05", ("0",), 0),  # an answer of zero has no 5 %
        ("0", ("0",), 1),
        ("YES", ("Yes",), 1),
        ("yes.", ("Yes",), 0),
        ("", ("3",), 0),
        ("2015", ("red", "2014"), 1),
        ("nan", ("3",), 0),
    ],
)
def test_relaxed_accuracy(prediction, answers, expected):
    assert score("relaxed", prediction, *answers) == expected


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "expected"),
    [
        ("exact", " z9 t6\n", ("Z9 T6",), 1),
        ("exact", "z9 t6.", ("Z9 T6",), 0),
        ("exact", "", ("Z9",), 0),
        ("exact", "ΣΊΣΥΦΟΣ".lower(), ("Σίσυφος",), 1),
        ("exact", "cafe\u0301", ("nothing", "Café"), 1),
        ("gqa", "Left.", ("left",), 1),
        ("gqa", "on the left", ("left",), 0),
        ("gqa", "", ("left",), 0),
    ],
)
def test_exact_matches(metric, prediction, answers, expected):
    assert score(metric, prediction, *answers) == expected


CHOICES = ["teddy bear", "rabbit", "cat", "dog"]  # of MMBench's own example, lmms-eval mmbench_evals.py


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("a cute teddy bear", 0),  # MMBench's first example
        ("Spider", None),  # and its second
        ("B", 1),
        ("b", 1),
        ("B.", 1),
        ("(B)", 1),
        ("**B**", 1),
        ("B. rabbit", 1),
        ("Answer: C", 2),
        ("The answer is (D).", 3),
        ("A cat sits on the mat", 2),  # an article
        ("Dog.", 3),
        ("either B or C", None),
        ("cat or dog", None),
        ("", None),
        ("E", None),
        ("兔子", None),
    ],
)
def test_option_that_a_prediction_names(prediction, expected):
    assert chosen_option(prediction, CHOICES) == expected


def test_an_option_inside_another():
    assert chosen_option("10", ["1", "10"]) == 1
    assert chosen_option("It is 1", ["1", "10"]) == 0


def test_multiple_choice_answers_are_letters_or_texts():
    assert score("multiple_choice", "(B)", "B", choices=CHOICES) == 1
    assert score("multiple_choice", "rabbit", "B", choices=CHOICES) == 1
    assert score("multiple_choice", "B", "rabbit", choices=CHOICES) == 1
    assert score("multiple_choice", "A", "rabbit", choices=CHOICES) == 0
    assert score("multiple_choice", "no idea", "rabbit", choices=CHOICES) == 0


def test_circular_accuracy_wants_every_rotation():
    examples = [example("A", circular=1, category="x"), example("B", circular=1, category="x")]
    examples += [example("A", circular=2, category="y"), example("B", circular=2, category="y")]
    summary = METRICS["multiple_choice"].summary([1, 0, 1, 1], examples)
    assert summary == {"x": 0.5, "y": 1.0, "circular accuracy": 0.5}
    alone = METRICS["multiple_choice"].summary([1, 1], examples[::2])
    assert alone == {"x": 1.0, "y": 1.0}


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        (" Yes, it is", "yes"),
        ("N", "no"),
        ("y", "yes"),
        ("It is. Yes", None),
        ("", None),
        ("是", None),
    ],
)
def test_yes_or_no(prediction, expected):
    assert yes_or_no(prediction) == expected


def pairs(category, both, one, none):
    """Return scores and examples of images whose questions are both, one or none of them right."""
    scores = [1.0, 1.0] * both + [1.0, 0.0] * one + [0.0, 0.0] * none
    images = [(f"{category}{number // 2}",) for number in range(len(scores))]
    return scores, [example("Yes", images=image, category=category) for image in images]


def test_mme_scores_as_published():
    """Published in InternLM-XComposer, eval_mm/mme/MME_Bench.md; the counts of right answers are inferred.

    30 images for each of the first three categories, 20 for the last, two questions each.
    """
    parts = [pairs("existence", 28, 2, 0), pairs("count", 22, 7, 1), pairs("position", 17, 8, 5)]
    parts.append(pairs("numerical_calculation", 3, 10, 7))
    scores = [one for part in parts for one in part[0]]
    examples = [one for part in parts for one in part[1]]
    summary = METRICS["mme"].summary(scores, examples)
    assert summary["existence"] == pytest.approx(190.0, rel=1e-12)
    assert summary["count"] == pytest.approx(158.33333333333331, rel=1e-12)
    assert summary["position"] == pytest.approx(126.66666666666666, rel=1e-12)
    assert summary["numerical_calculation"] == summary["cognition"] == pytest.approx(55.0, rel=1e-12)
    assert summary["perception"] == pytest.approx(190 + 158 + 1 / 3 + 126 + 2 / 3, rel=1e-12)
    assert summary["total"] == pytest.approx(530.0, rel=1e-12)


def test_mme_of_a_sample_counts_whole_pairs():
    scores, examples = pairs("count", 1, 1, 0)
    summary = METRICS["mme"].summary(
        scores[:3], examples[:3]
    )  # the wrong answer to the second image is not there
    assert summary["count"] == pytest.approx(200)
    assert METRICS["mme"].summary(scores[:1], examples[:1]) == {"perception": 0, "cognition": 0, "total": 0}


def test_mme_of_one_answer():
    assert score("mme", "Yes, there is.", "Yes") == 1
    assert score("mme", "No", "Yes") == 0
    assert score("mme", "", "No") == 0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("[10, 20, 30, 40]", (10, 20, 30, 40)),
        ("<ref>dog</ref><box>[[10, 20, 30, 40]]</box>", (10, 20, 30, 40)),
        ("<|box_start|>(10,20),(30,40)<|box_end|>", (10, 20, 30, 40)),
        ('```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "dog"}]\n```', (10, 20, 30, 40)),
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("[1, 2, 3, 4] or [5, 6, 7, 8]", (1, 2, 3, 4)),
        ("[10, 20, 30]", None),
        ("", None),
    ],
)
def test_boxes_are_read(prediction, expected):
    assert parse_box(prediction) == expected


def test_intersection_over_union():
    assert intersection_over_union([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7, rel=1e-12)
    assert intersection_over_union([0, 0, 2, 2], [0, 0, 2, 2]) == 1
    assert intersection_over_union([0, 0, 1, 1], [2, 2, 3, 3]) == 0
    assert intersection_over_union([2, 2, 0, 0], [0, 0, 2, 2]) == 0
    assert intersection_over_union([0, 0, 0, 0], [0, 0, 0, 0]) == 0


def test_box_scales():
    """A true box of 100 x 100 at (200, 100), in an image of 1000 x 500: three ways to say it."""
    truth = {"box": [200, 100, 300, 200], "width": 1000, "height": 500}
    assert score("box", "[200, 200, 300, 400]", **truth) == 1
    assert score("box", "[0.2, 0.2, 0.3, 0.4]", **truth) == 1
    assert score("box", "[200, 100, 300, 200]", **truth) == 0
    assert score("box", "[200, 100, 300, 200]", **truth, box_scale="pixels") == 1
    assert score("box", "nowhere", **truth) == 0


def test_boxes_that_share_half_count():
    truth = {"box": [0, 0, 200, 100], "width": 1000, "height": 1000}
    assert score("box", "[0, 0, 100, 100]", **truth) == 1
    assert score("box", "[0, 0, 99, 100]", **truth) == 0


@pytest.mark.parametrize(
    ("metric", "answers", "extra", "says"),
    [
        ("exact", (), {}, "no answer"),
        ("multiple_choice", ("A",), {}, "choices"),
        ("multiple_choice", ("A",), {"choices": ["one"]}, "choices"),
        ("multiple_choice", ("C",), {"choices": ["x", "y"]}, "one of the 2 choices"),
        ("multiple_choice", (), {"choices": ["x", "y"]}, "no answer"),
        ("mme", ("maybe",), {"category": "count"}, "yes or no"),
        ("mme", ("yes",), {}, "category"),
        ("box", (), {}, "box must be"),
        ("box", (), {"box": [3, 0, 1, 1], "width": 9, "height": 9}, "x1 < x2"),
        ("box", (), {"box": [0, 0, 1, True], "width": 9, "height": 9}, "box must be"),
        ("box", (), {"box": [0, 0, 1, 1]}, "width and height"),
        ("box", (), {"box": [0, 0, 1, 1], "width": 0, "height": 9}, "width and height"),
        ("box", (), {"box": [0, 0, 1, 1], "box_scale": "percent"}, "box_scale"),
    ],
)
def test_what_an_example_lacks(metric, answers, extra, says):
    assert says in METRICS[metric].problem(example(*answers, **extra))


def test_complete_examples_lack_nothing():
    assert METRICS["vqa"].problem(example("yes")) is None
    assert METRICS["multiple_choice"].problem(example("y", choices=["x", "y"])) is None
    assert METRICS["mme"].problem(example("Yes", category="count")) is None
    assert METRICS["box"].problem(example(box=[0, 0, 1, 1], width=9, height=9)) is None
    assert METRICS["box"].problem(example(box=[0, 0, 1, 1], box_scale="pixels")) is None
    assert METRICS["judge"].problem(example()) is None


def test_a_missing_rapidfuzz_is_known_before_the_first_answer(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ConfigError, match=r"sgl-vlm\[eval\]"):
        METRICS["anls"].problem(example("x"))


def test_means_per_category():
    examples = [example(category="b"), example(category="a"), example(category="b")]
    assert METRICS["box"].summary([1, 0, 0], examples) == {"a": 0.0, "b": 0.5}
    assert METRICS["vqa"].summary([1, 0], [example(), example()]) == {}


def test_more_than_50_categories_have_no_means():
    examples = [example(category=number) for number in range(51)]
    means = METRICS["exact"].summary([1] * 50, examples[:50])
    assert means == {str(number): 1.0 for number in range(50)}
    assert METRICS["exact"].summary([1] * 51, examples) == {}
    assert METRICS["multiple_choice"].summary([1] * 51, examples) == {}
    yes = [example("yes", images=(str(n // 2),), category=str(n // 2)) for n in range(102)]
    assert METRICS["mme"].summary([1.0] * 102, yes) == {"perception": 10200, "cognition": 0, "total": 10200}


@pytest.mark.parametrize("category", [["a"], {"a": 1}, True, 0.5])
def test_categories_are_texts_or_whole_numbers(category):
    assert METRICS["exact"].summary([1, 0], [example(category="a"), example(category=category)]) == {}


def test_a_judge_is_needed():
    assert [name for name, metric in METRICS.items() if not metric.automatic] == ["judge"]
    with pytest.raises(DataError, match="MM-Vet"):
        score("judge", "anything", "x")
