"""Write the bundled sample pictures, from scenes that are neither trained nor tested on.

python -m sgl_runtime.tiny.make_samples
"""

from __future__ import annotations

import json
from pathlib import Path

from sgl_runtime.files import whole_file

from .scenes import make_scene

# Chosen to show each course a request can take: small wrong and large right, and early exit.
CASES = ((1, "read two"), (2, "read"), (2, "describe"), (3, "count"))


def main() -> None:
    """Write the scenes of CASES and one question of the given kind about each."""
    folder = Path(__file__).parent / "samples"
    listed = []
    for index, kind in CASES:
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
