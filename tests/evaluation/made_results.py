"""Results and their data set, of random numbers: what the tests of summaries, plots and reports share."""

from __future__ import annotations

from typing import Any

import numpy as np

from sgl_runtime.evaluation.calibration import LOSS_PROCEDURE, Calibration
from sgl_runtime.evaluation.data import BadRow, DataSet, Example
from sgl_runtime.evaluation.results import Results, describe

LAYERS, COUNT = 10, 60
SECONDS = {"small": 0.125, "large": 0.5, "guided": 0.25, "random": 0.25}
#: A calibration with nothing unusual; tests replace what they are about.
CALIBRATION = Calibration(
    exit_threshold=0.915,
    keep_ratio=0.2,
    prune_layer=2,
    exit_score="both",
    consistency_keep_ratio=0.05,
    keep_scope="request",
    max_new_tokens=8,
    promise="accuracy",
    alpha=0.02,
    delta=0.1,
    procedure=LOSS_PROCEDURE,
    pair={"small": "a" * 64, "large": "b" * 64},
    compute={"small": "float32", "large": "float32"},
    metric="exact",
    suffix="",
    data_set="tiny scenes",
    data_sha256="c" * 64,
    examples=1200,
    groups=300,
    measured={"exit_share": 0.31, "loss": -0.004},
    date="2025-06-30",
    versions={"sgl-vlm": "0.1.0", "torch": "2.13.0"},
)
SETTINGS = {(0.4, 4): 0.8, (0.2, 2): 0.75, (0.05, 0): 0.5}  # to how often "guided" is right


def make_results() -> tuple[Results, DataSet]:
    """Sixty questions about thirty images, by small, large, guided and random at three settings."""
    generator = np.random.default_rng(3)
    methods: dict[tuple[str, float | None, int | None], float] = {
        ("small", None, None): 0.6,
        ("large", None, None): 0.85,
        **{("guided", *setting): share for setting, share in SETTINGS.items()},
        **{("random", *setting): share - 0.3 for setting, share in SETTINGS.items()},
    }
    rows: list[dict[str, Any]] = []
    for number in range(COUNT):
        for (method, keep_ratio, prune_layer), share in methods.items():
            right = generator.random() < share
            row = {
                "id": str(number),
                "group": f"/images/{number // 2}.png",
                "method": method,
                "keep_ratio": keep_ratio,
                "prune_layer": prune_layer,
                "prediction": f"answer {number}" if right else "no",
                "score": float(right),
                "seconds": SECONDS[method],
                "stages": {
                    f"{method}_prefill": 0.75 * SECONDS[method],
                    f"{method}_decode": SECONDS[method] / 4,
                },
            }
            if method == "small":
                confidence, consistency = (round(0.3 * right + 0.7 * generator.random(), 1) for _ in range(2))
                row |= {
                    "confidence": confidence,
                    "consistency": consistency,
                    "decision_score": (confidence + consistency) / 2,
                }
            rows.append(row)
    vlm = {"fingerprint": "ab" * 32, "layers": LAYERS, "compute": "float32"}
    header = {
        "format": 1,
        "pair": {"small": vlm, "large": vlm},
        "data set": {},
        "settings": {
            "max_new_tokens": 8,
            "consistency_keep_ratio": 0.05,
            "exit_score": "both",
            "keep_scope": "request",
        },
        "seed": 0,
        "versions": {"sgl-vlm": "0.1.0"},
    }
    examples = tuple(
        Example(
            str(i),
            (f"/images/{i // 2}.png",),
            f"question {i}",
            (f"answer {i}",),
            {"category": "odd" if i % 2 else "even"},
        )
        for i in range(COUNT)
    )
    dataset = DataSet("made", "exact", examples, (BadRow(7, "it has no image"),))
    header["data set"] = describe(dataset)
    runs = [{"started": "2026-01-01T10:00:00+00:00", "machine": "an abacus, 2 threads"}]
    return Results(header, rows, runs=runs), dataset


def rows_of(
    results: Results, method: str, keep_ratio: float | None = None, prune_layer: int | None = None
) -> list[dict[str, Any]]:
    """The rows of one method, in the order of the examples."""
    key = (method, keep_ratio, prune_layer)
    return [row for row in results.rows if (row["method"], row["keep_ratio"], row["prune_layer"]) == key]
