from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from sgl_runtime.tiny import recipe
from sgl_runtime.tiny.scenes import make_scene
from sgl_runtime.tiny.train import export


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two random checkpoints, small and large, made as the trained ones are."""
    paths = []
    for seed, name in enumerate(("small", "large")):
        torch.manual_seed(seed)
        size = dataclasses.replace(recipe.SIZES[name], layers=3, vision_layers=1)
        path = tmp_path_factory.mktemp("pair") / name
        export(recipe.build_model(size), path)
        paths.append(str(path))
    return paths[0], paths[1]


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("picture") / "scene.png"
    make_scene("test", 0).image.save(path)
    return str(path)
