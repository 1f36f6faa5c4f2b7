"""The README's table of models: every row is a family, and its tests exist and run."""

from __future__ import annotations

import re
from pathlib import Path

from sgl_runtime.families import FAMILIES, REFUSED
from tests.families import models, test_tensor_parallel

ROOT = Path(__file__).parents[2]


def rows() -> dict[str, list[str]]:
    """The table's rows by model type; the last cell of each is tensor parallelism."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Models") : text.index("## How it runs")]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:2] == "| "
    ]
    typed = [(re.findall(r"`(\w+)`", row[1]), row) for row in cells]
    return {names[-1]: row for names, row in typed[1:] if names and names[-1].islower()}


def test_every_family_has_a_row_and_every_row_a_family() -> None:
    assert rows().keys() == {name for family in (*FAMILIES, *REFUSED) for name in family.model_types}


def test_rows_name_their_tests() -> None:
    told = set()
    for model_type, row in rows().items():
        if model_type == "gemma3":
            continue
        first, *more = re.findall(r"`([\w.-]+)`", row[3])
        names = [first, *(first.partition("-")[0] + name if name[0] == "-" else name for name in more)]
        assert {models.FAMILIES[name].model_type for name in names} == {model_type}
        told |= set(names)
    assert told == models.FAMILIES.keys()


def test_what_rows_say_of_videos_and_processes() -> None:
    found = rows()
    for family in FAMILIES:
        for model_type in family.model_types:
            row = found[model_type]
            assert row[6] == ("yes" if family.video else "no")
            cases = {name for name, case in models.FAMILIES.items() if case.model_type == model_type}
            refused = cases & test_tensor_parallel.REFUSED.keys()
            assert row[7].startswith("refused" if refused == cases else "yes")
            assert ("refused" in row[7]) == bool(refused)
