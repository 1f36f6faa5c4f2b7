"""A ranking of one's own: sgl-vlm eval ... --ranking guided --ranking examples.centre_ranking:Centre"""

from torch import Tensor

from sgl_runtime.evaluation.rankings import Context


class Centre:
    name = "centre"

    def rank(self, context: Context) -> Tensor:
        cells = context.large_request.prompt.cells.boxes  # (N, 3, 2): time, height, width
        return -(cells[:, 1:].mean(-1) - 0.5).norm(dim=-1)[None]
