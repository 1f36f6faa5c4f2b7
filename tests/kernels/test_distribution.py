"""What the source and the binary distribution hold. Both are built from a copy, without compiling."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ["csrc", "sgl_kernels", "sgl_runtime", "tests", "benchmarks", "docs", "examples"]
BUILD = """
from setuptools import build_meta
build_meta.build_sdist("dist")
build_meta.build_wheel("dist")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Names in the sdist and in the wheel."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in COPIED:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tree / file.name)
    for weights in ("small", "large"):  # stand-ins: the real ones would be compressed for nothing
        (tree / "sgl_runtime/tiny" / weights).mkdir(exist_ok=True)
        (tree / "sgl_runtime/tiny" / weights / "model.safetensors").touch()
    for folder in ("csrc", "sgl_runtime/tiny", "sgl_runtime/tiny/fonts", "tests/kernels"):
        (tree / folder / "__pycache__").mkdir(exist_ok=True)
        (tree / folder / "__pycache__" / "stale.cpython-311.pyc").touch()
    (tree / "sgl_kernels" / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    (tree / "csrc" / "left_over.so").touch()
    subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=tree,
        env={**os.environ, "SGL_KERNELS_SKIP_BUILD": "1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as sdist:
        source = {name.partition("/")[2] for name in sdist.getnames()}
    with zipfile.ZipFile(next((tree / "dist").glob("*.whl"))) as wheel:
        return source, set(wheel.namelist())


def files(folder, *suffixes):
    found = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in suffixes}
    assert found
    return found


def test_sdist_can_be_built_and_tested(built):
    source, _ = built
    assert files("csrc", ".cpp", ".h", ".cu", ".cuh") <= source
    assert files("tests", ".py", ".h") | files("benchmarks", ".py", ".sh") | files("docs", ".md") <= source
    assert files("examples", ".py") <= source
    top = ["Makefile", "CONTRIBUTING.md", "README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py"]
    assert source >= {*top, "sgl_kernels/py.typed", "sgl_runtime/py.typed"}


def test_both_hold_the_data_of_the_tiny_pair(built):
    for names in built:
        assert names >= files("sgl_runtime/tiny/fonts", ".ttf") | files(
            "sgl_runtime/tiny/samples", ".png", ".json"
        )
        assert names >= {f"sgl_runtime/tiny/{size}/model.safetensors" for size in ("small", "large")}
        assert names >= {"sgl_runtime/tiny/README.md", "sgl_runtime/tiny/fonts/LICENSE_DEJAVU"}


def test_neither_holds_build_leftovers(built):
    for names in built:
        assert not [n for n in names if "__pycache__" in n or n.endswith((".pyc", ".so"))]


def test_both_hold_the_kernels_in_python(built):
    for names in built:
        assert names >= files("sgl_kernels", ".py", ".json")


def test_wheel_holds_the_packages_only(built):
    _, wheel = built
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {
        "sgl_kernels",
        "sgl_runtime",
    }
