"""The model class ``SGLVLM`` for VLMEvalKit, and its ``run.py`` with that class known.

VLMEvalKit (https://github.com/open-compass/VLMEvalKit) has no place where packages announce models: its
``--config`` looks classes up in ``vlmeval.vlm``. So this module starts it:

    python -m sgl_runtime.plugins.vlmevalkit [path/to/VLMEvalKit/run.py] --config config.json ...

Without a path the ``vlmeval.run`` of the package is started.
"""

from __future__ import annotations

import atexit
import logging
import runpy
import sys
from typing import Any

import vlmeval.vlm
from vlmeval.vlm.base import BaseModel

from sgl_runtime.errors import SGLError
from sgl_runtime.plugins.guided import Guided, Part

log = logging.getLogger("sgl_runtime.plugins.vlmevalkit")
# VLMEvalKit counts an answer that holds this as failed, scores it as wrong and asks again with --reuse.
FAILED = "Failed to obtain answer via API."


class SGLVLM(BaseModel):
    """A small VLM guiding a large one, as a model of VLMEvalKit.

    Parameters
    ----------
    small, large
        Checkpoints: directories or hub ids.
    nframe
        Frames taken of a video; a data set's own ``nframe`` takes precedence.
    **options
        ``calibration``, ``device``, ``dtype``, ``quantize`` and the fields of `SGLConfig`.

    Raises
    ------
    ConfigError, CheckpointError
        As `Guided`.
    """

    INTERLEAVE = True

    def __init__(self, small: str, large: str, nframe: int = 8, **options: Any) -> None:
        super().__init__()
        self.nframe = nframe
        self._guided = Guided(small, large, **{"max_batch": 1, **options})
        processors = (self._guided.pipe.small_processor, self._guided.pipe.large_processor)
        # Else VLMEvalKit gives a video's frames as images.
        self.VIDEO_LLM = all(each is not None and each.preprocessor.video_mark for each in processors)
        atexit.register(lambda: print(self._guided.tally, file=sys.stderr))

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """Answer greedily; a question that fails gets `FAILED` and a warning.

        Parameters
        ----------
        message
            Parts in order, each with "type" (text, image, video), "value" and perhaps "role".
        dataset
            Its name, for the warning.
        """
        parts = [Part(part.get("role", "user"), part["type"], part["value"]) for part in message]
        (answer,) = self._guided([parts], num_frames=self.nframe)
        if isinstance(answer, SGLError):
            log.warning("A question of %s failed: %s", dataset, answer)
            return FAILED
        return answer.text or ""


def main() -> None:
    """Run VLMEvalKit's ``run.py`` with `SGLVLM` among its classes."""
    vlmeval.vlm.SGLVLM = SGLVLM
    if len(sys.argv) > 1 and sys.argv[1].endswith(".py"):
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module("vlmeval.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
