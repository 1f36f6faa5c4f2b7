"""The pages about the ops: one each, with an example that runs, the right signature and working links."""

import doctest
import inspect
import re
from pathlib import Path

import pytest

import sgl_kernels
from sgl_kernels import registry

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "ops"


@pytest.mark.parametrize("op", registry.SCHEMAS)
def test_page_of_each_op(op):
    page = PAGES / f"{op}.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted >= 3
    assert result.failed == 0
    text = page.read_text(encoding="utf-8")
    for section in ("What it computes", "Arguments", "Cost", "Example"):
        assert f"\n## {section}\n" in text
    signature = inspect.signature(getattr(sgl_kernels, op))
    written = re.search(rf"```\n{op}\((.*)\) -> ", text)[1]
    names = [re.split(r"=", part.strip())[0] for part in written.split(",") if part.strip() not in ("*", ")")]
    assert [name for name in names if name] == list(signature.parameters)


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.name)
def test_links(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []


def test_the_index_names_every_op():
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+)\]\(\1\.md\)", index, re.MULTILINE) == list(registry.SCHEMAS)
