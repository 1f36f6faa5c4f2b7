"""The trained tiny pair: two InternVL-architecture VLMs small enough to ship, and the scenes they know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

_HERE = Path(__file__).parent
SMALL = _HERE / "small"
LARGE = _HERE / "large"


class Sample(TypedDict):
    """A bundled picture, a question about it and the right answer."""

    image: str
    prompt: str
    answer: str


def samples() -> list[Sample]:
    """Return the bundled samples; ``image`` is a path."""
    folder = _HERE / "samples"
    listed: list[Sample] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    for sample in listed:
        sample["image"] = str(folder / sample["image"])
    return listed
