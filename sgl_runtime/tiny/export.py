"""Scenes of the tiny pair as a data set that `sgl-vlm eval` reads.

python -m sgl_runtime.tiny.export --split calibration --scenes 300 --out runs/tiny-calibration
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from sgl_runtime.files import whole_file

from .scenes import make_scene

QUESTIONS_PER_SCENE = 4


def export(split: str, scenes: int, out: Path, first: int = 0) -> Path:
    """Write scenes of ``split``, from ``first`` on, as PNGs and a JSONL of questions; return the latter."""
    lines = []
    for index in range(first, first + scenes):
        scene = make_scene(split, index, QUESTIONS_PER_SCENE)
        name = f"{split}-{index:04}.png"
        with whole_file(out / name) as partial:
            scene.image.save(partial, format="PNG")
        for number, question in enumerate(scene.questions):
            row = {"id": f"{index}-{number}", "image": name, "question": question.text}
            lines.append(json.dumps({**row, "answer": question.answer, "category": question.kind}))
    file = out / f"{split}.jsonl"
    with whole_file(file) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def main(
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    scenes: Annotated[int, typer.Option(help="How many, of four questions each.", min=1)] = 300,
    split: Annotated[Literal["test", "calibration"], typer.Option(help="Which scenes.")] = "test",
) -> None:
    """Write scenes as a data set."""
    typer.echo(export(split, scenes, out))


if __name__ == "__main__":
    typer.run(main)
