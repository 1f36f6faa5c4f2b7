"""Write the bundled sample pictures, from scenes that are neither trained nor tested on.

python -m sgl_runtime.tiny.make_samples
"""

from __future__ import annotations

import json
from pathlib import Path

from sgl_runtime.files import whole_file

from .scenes import KINDS, make_scene

SCENES = (0, 1, 2, 3)


def main() -> None:
    """One scene and one question of each kind."""
    folder = Path(__file__).parent / "samples"
    listed = []
    for index, kind in zip(SCENES, KINDS, strict=True):
        scene = make_scene("demo", index, 24)
        name = f"scene-{index}.png"
        with whole_file(folder / name) as partial:
            scene.image.save(partial, format="png")
        question = next(q for q in scene.questions if q.kind == kind)
        listed.append({"image": name, "prompt": question.text, "answer": question.answer})
    with whole_file(folder / "samples.json") as partial:
        partial.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
