"""The benchmarks' own metrics: what a prediction scores, and what a data set's scores add up to.

Every text is compared in Unicode's composed form (NFC). Sources are named at each metric; the commits are
those of the public code that was read.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sgl_runtime.errors import ConfigError, DataError
from sgl_runtime.images import cut

if TYPE_CHECKING:
    from sgl_runtime.evaluation.data import Example

# LLaVA, docs/Evaluation.md: short-answer and option-only questions.
_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
_MOST_CATEGORIES = 50  # each is a column of the report


@dataclass(frozen=True)
class Metric:
    """How predictions of a data set are scored.

    Attributes
    ----------
    score : prediction and example to a number in [0, 1]
    problem : what an example lacks to be scored with this metric, or None
    summary : what is not the mean over all examples, by name: means per ``extra["category"]``, MME's scores
    suffix : what the benchmark asks with; the prompt is ``question + suffix``
    automatic : False where a judge is needed: predictions can be stored, `score` raises
    shares : whether the numbers of ``summary`` are shares, shown in percent; MME's are points
    """

    score: Callable[[str, Example], float]
    problem: Callable[[Example], str | None]
    summary: Callable[[Sequence[float], Sequence[Example]], dict[str, float]]
    suffix: str = ""
    automatic: bool = True
    shares: bool = True


def _text(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _any_equal(prediction: str, answers: Sequence[str], clean: Callable[[str], str]) -> float:
    predicted = clean(prediction)
    return float(any(predicted == clean(answer) for answer in answers))


def exact_match(prediction: str, example: Example) -> float:
    """Score 1 for an accepted answer, letter case and space around it aside.

    As ``evaluate_exact_match_accuracy`` of InternVL (internvl_chat/eval/vqa/evaluate_vqa.py, 0b25955).
    """
    return _any_equal(prediction, example.answers, lambda text: _text(text).lower())


def gqa(prediction: str, example: Example) -> float:
    """Score 1 for the answer, letter case and full stops at the end aside.

    GQA's eval.py compares strings; InternVL's convert_gqa_for_eval.py (749a4c3) cleans predictions like this.
    """
    return _any_equal(prediction, example.answers, lambda text: _text(text).rstrip(".").lower())


# What VQA's evaluation puts an apostrophe into: a word that lacks one of its apostrophes gets it back.
_CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it somebody someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for ending, stems in _CONTRACTED.items()
    for word in (stem + ending for stem in stems.split())
    for at, letter in enumerate(word)
    if letter == "'"
}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalize_answer(answer: str) -> str:
    """Return an answer as VQA's evaluation compares it.

    Punctuation goes: without a trace where it touches a space or where the answer holds a number like 1,000,
    else it becomes a space; a full stop goes unless a digit follows. Then letter case, articles, numbers from
    zero to ten in words, missing apostrophes. After ``processPunctuation`` and ``processDigitArticle`` of
    github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py (c4e6a0e).
    """
    text = re.sub(r"[\n\t]", " ", _text(answer)).strip()
    in_number = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if touches_space or in_number else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction: str, example: Example) -> float:
    """Score ``min(matching / 3, 1)``, averaged over leaving out one annotator at a time.

    ``example.answers`` holds one answer per annotator, ten in VQAv2 and TextVQA. Fewer than four cannot vote:
    each is taken as accepted, and one match scores 1. Unlike vqaEval.py, which leaves unanimous annotators'
    answers as they are, answers are always normalised, as in TextVQA's evaluation.

    See visualqa.org/evaluation: "averaged over all 10 choose 9 sets of human annotators".
    """
    answers = [normalize_answer(answer) for answer in example.answers]
    matching, annotators = answers.count(normalize_answer(prediction)), len(answers)
    if annotators < 4:
        return float(matching > 0)
    left_out_matches, left_out_differs = min((matching - 1) / 3, 1), min(matching / 3, 1)
    return (matching * left_out_matches + (annotators - matching) * left_out_differs) / annotators


def anls(prediction: str, example: Example) -> float:
    """Average normalised Levenshtein similarity of one question, 0 where it is below 0.5.

    Biten et al., ICCV 2019 (arXiv 1905.13648), equation 1; letter case and repeated space aside. A similarity
    of exactly 0.5 counts, as in the evaluation script of the Robust Reading Competition; the paper's equation
    drops it.
    """
    predicted, *answers = (" ".join(_text(text).lower().split()) for text in (prediction, *example.answers))
    best = max(_similarity()(predicted, answer) for answer in answers)
    return best if best >= 0.5 else 0.0


def _similarity() -> Callable[[str, str], float]:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ConfigError('ANLS needs rapidfuzz, which is not here: pip install "sgl-vlm[eval]".') from error
    return Levenshtein.normalized_similarity


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, example: Example) -> float:
    """Score 1 for a number within 5 % of the answer, or for the same text.

    "45%" is the number 0.45. An answer of 0, or what is no number, must be the same text, letter case aside.
    ChartQA (arXiv 2203.10244), section 5.1, as ``relaxed_correctness`` of pix2struct (pix2struct/metrics.py).
    """
    predicted = _text(prediction)
    return float(any(_within(predicted, _text(answer)) for answer in example.answers))


def _within(predicted: str, answer: str) -> bool:
    number, target = _number(predicted), _number(answer)
    if number is None or not target:
        return predicted.lower() == answer.lower()
    return abs(number - target) / abs(target) <= 0.05


def chosen_option(prediction: str, choices: Sequence[str]) -> int | None:
    """Return which of ``choices`` a prediction names, or None.

    A letter alone, whatever its case; else the one option letter among the words; else the option whose text
    is the prediction; else the one option whose text is in it. "A" among more than three words is an article.
    These are VLMEvalKit's rules (vlmeval/utils/matching_util.py, ``can_infer``; lmms-eval has the same for
    MMBench), with the option that equals the prediction put before those that it contains. There a judge or
    chance settles the rest; here it counts as no answer.
    """
    text = _text(prediction)
    letters = string.ascii_uppercase[: len(choices)]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    if len(words) == 1 and len(words[0]) == 1 and words[0].upper() in letters:
        return letters.index(words[0].upper())
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and not (named[0] == "A" and len(words) > 3):
        return letters.index(named[0])
    options = [_text(choice).lower() for choice in choices]
    for wanted in (lambda option: option == text.lower().rstrip("."), lambda option: option in text.lower()):
        found = [number for number, option in enumerate(options) if option and wanted(option)]
        if len(found) == 1:
            return found[0]
    return None


def _right_option(example: Example) -> int | None:
    """Which choice the answer is: its letter, or its text."""
    choices = example.extra["choices"]
    answer = _text(example.answers[0])
    if len(answer) == 1 and answer.upper() in string.ascii_uppercase[: len(choices)]:
        return string.ascii_uppercase.index(answer.upper())
    return next((number for number, choice in enumerate(choices) if _text(choice) == answer), None)


def multiple_choice(prediction: str, example: Example) -> float:
    """Score 1 where the option that `chosen_option` reads from the prediction is the answer.

    ``extra["choices"]`` lists the options' texts; the answer is a letter, or an option's text.
    """
    return float(chosen_option(prediction, example.extra["choices"]) == _right_option(example))


def yes_or_no(prediction: str) -> str | None:
    """Return "yes" or "no" as MME's eval_tool reads it: from the first four letters; or None."""
    text = _text(prediction).lower()
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def mme(prediction: str, example: Example) -> float:
    """Score 1 for the right one of yes and no; `mme_scores` adds them up."""
    return float(yes_or_no(prediction) == yes_or_no(example.answers[0]))


_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_scores(scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
    """Return MME's score per category, and their sums: perception, cognition and total.

    A category's score is accuracy plus accuracy+, in percent, so at most 200: accuracy+ is the share of
    images both of whose questions are right (arXiv 2306.13394, section 2.2). Images of which `scores` hold
    one question only (a sample was drawn) count for accuracy alone; a category without a whole pair has no
    score. Of more than 50 categories, which are not MME's own, the sums alone.
    """
    questions: dict[str, dict[tuple[str, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for score, example in zip(scores, examples, strict=True):
        questions[str(example.extra["category"])][example.images].append(score)
    out = {}
    for category, images in questions.items():
        pairs = [pair for pair in images.values() if len(pair) > 1]
        if pairs:
            accuracy = _mean([score for image in images.values() for score in image])
            out[category] = 100 * (accuracy + _mean([float(min(pair) == 1) for pair in pairs]))
    cognition = sum(score for category, score in out.items() if category in _COGNITION)
    total = sum(out.values())
    sums = {"perception": total - cognition, "cognition": cognition, "total": total}
    return out | sums if len(out) <= _MOST_CATEGORIES else sums


_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}(?:,|\)\s*,\s*\(){_NUMBER},{_NUMBER}[\])]")


def parse_box(prediction: str) -> tuple[float, float, float, float] | None:
    """Return the first box of a prediction, as it stands there, or None.

    Read are ``[x1, y1, x2, y2]``, alone or in more brackets, tags or JSON (InternVL, LLaVA, Qwen2.5-VL,
    Qwen3-VL), and ``(x1,y1),(x2,y2)`` (Qwen-VL, Qwen2-VL).
    """
    found = _BOX.search(prediction)
    return None if found is None else tuple(map(float, found.groups()))  # type: ignore[return-value]


def box_accuracy(prediction: str, example: Example) -> float:
    """Score 1 where the intersection over union with ``extra["box"]`` is at least 0.5.

    ``extra`` holds ``box``, the true ``[x1, y1, x2, y2]`` in pixels, ``width`` and ``height`` of the image,
    and ``box_scale``, what the model answers in. "relative", the default: thousandths of the image, or, where
    the four numbers add up to less than 4, shares of it, which is the rule of InternVL's
    evaluate_grounding.py (0355722). "pixels": pixels of the image as it is on disk, which is what Qwen2.5-VL
    answers in where it does not scale it.
    """
    box = parse_box(prediction)
    if box is None:
        return 0.0
    if example.extra.get("box_scale", "relative") == "relative":
        unit = 1000 if sum(box) >= 4 else 1
        across, down = example.extra["width"] / unit, example.extra["height"] / unit
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return float(intersection_over_union(box, example.extra["box"]) >= 0.5)


def intersection_over_union(box: Sequence[float], other: Sequence[float]) -> float:
    """Return common area by united area of two ``[x1, y1, x2, y2]`` boxes; 0 for empty ones."""
    common = _area(*map(max, box[:2], other[:2]), *map(min, box[2:], other[2:]))
    union = _area(*box) + _area(*other) - common
    return common / union if union > 0 else 0.0


def _area(x1: float, y1: float, x2: float, y2: float) -> float:
    return max(x2 - x1, 0) * max(y2 - y1, 0)


def _judged(prediction: str, example: Example) -> float:
    raise DataError(
        "This data set has no automatic metric: MM-Vet's answers are graded by GPT-4. Store the predictions "
        "and send them to huggingface.co/spaces/whyu/MM-Vet_Evaluator, or choose a metric, e.g. exact."
    )


def category_means(scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
    """Return the mean score per ``extra["category"]``, a text or a whole number.

    Nothing where no example has one, one is something else, or there are more than 50.
    """
    grouped = defaultdict(list)
    for score, example in zip(scores, examples, strict=True):
        if "category" in example.extra:
            category = example.extra["category"]
            if type(category) not in (str, int):
                return {}
            grouped[str(category)].append(score)
    if len(grouped) > _MOST_CATEGORIES:
        return {}
    return {category: _mean(group) for category, group in sorted(grouped.items())}


def choice_summary(scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
    """Return the means per category and, where options were rotated, MMBench's circular accuracy.

    A question counts there when it is right in every rotation (arXiv 2307.06281, CircularEval); those of one
    question share ``extra["circular"]``.
    """
    rotations = defaultdict(list)
    for score, example in zip(scores, examples, strict=True):
        if "circular" in example.extra:
            rotations[example.extra["circular"]].append(score)
    out = category_means(scores, examples)
    if any(len(group) > 1 for group in rotations.values()):
        out["circular accuracy"] = _mean([float(min(group) == 1) for group in rotations.values()])
    return out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _needs_answer(example: Example) -> str | None:
    return None if example.answers else "it has no answer"


def _needs_answer_and_rapidfuzz(example: Example) -> str | None:
    _similarity()  # fails when the data are read, not hours later
    return _needs_answer(example)


def choices_problem(choices: Any) -> str | None:
    """Tell what is wrong with a question's choices, which get a letter each; None where nothing is."""
    is_list = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not is_list or not 2 <= len(choices) <= len(string.ascii_uppercase):
        count = f"{len(choices)}: " if isinstance(choices, list) else ""
        return f"choices must be a list of 2 to 26 texts, got {count}{cut(repr(choices))}"
    return None


def _needs_choices(example: Example) -> str | None:
    choices: Any = example.extra.get("choices")
    problem = choices_problem(choices)
    if problem is not None:
        return problem
    if not example.answers:
        return "it has no answer"
    if _right_option(example) is None:
        return (
            f"for multiple_choice the answer must be one of the {len(choices)} choices or its letter, "
            f"got {cut(repr(example.answers[0]))}"
        )
    return None


def _needs_yes_or_no(example: Example) -> str | None:
    if not example.answers or yes_or_no(example.answers[0]) is None:
        return f"the answer must be yes or no, got {cut(', '.join(example.answers)) or 'none'}"
    return None if "category" in example.extra else "it has no category"


def _needs_box(example: Example) -> str | None:
    scale = example.extra.get("box_scale", "relative")
    if scale not in ("relative", "pixels"):
        return f"box_scale must be relative or pixels, got {cut(repr(scale))}"
    box = _numbers(example.extra.get("box"))
    if len(box) != 4 or _area(*box) <= 0:
        given = example.extra.get("box")
        return f"box must be [x1, y1, x2, y2] in pixels with x1 < x2 and y1 < y2, got {cut(repr(given))}"
    size = _numbers([example.extra.get("width"), example.extra.get("height")])
    if scale == "relative" and not (size and min(size) > 0):
        return "width and height of the image, in pixels, must be given"
    return None


def _numbers(values: Any) -> list[float]:
    """Return a list of numbers as it is; an empty one for anything else."""
    is_list = isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)
    return list(values) if is_list else []


METRICS: dict[str, Metric] = {
    "exact": Metric(exact_match, _needs_answer, category_means),
    "vqa": Metric(vqa_accuracy, _needs_answer, category_means, _SHORT),
    "anls": Metric(anls, _needs_answer_and_rapidfuzz, category_means, _SHORT),
    "relaxed": Metric(relaxed_accuracy, _needs_answer, category_means, _SHORT),
    "gqa": Metric(gqa, _needs_answer, category_means, _SHORT),
    "multiple_choice": Metric(multiple_choice, _needs_choices, choice_summary, _LETTER),
    "mme": Metric(mme, _needs_yes_or_no, mme_scores, _SHORT, shares=False),
    "box": Metric(box_accuracy, _needs_box, category_means),
    "judge": Metric(_judged, lambda example: None, lambda scores, examples: {}, automatic=False),
}
