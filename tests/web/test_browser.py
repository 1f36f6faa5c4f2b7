"""The page in headless Chromium: a picture is uploaded, a question asked, the answer read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sgl_runtime import SGLConfig, SGLPipeline, tiny
from tests.web.served import browser, missing_browser

pytestmark = pytest.mark.skipif(missing_browser() is not None, reason=str(missing_browser()))
INSIDE = ("data", "blob", "chrome")  # the last is Chromium's own first tab
SAMPLES = tiny.samples()
CONFIG = SGLConfig(keep_ratio=0.05, prune_layer=0, exit_threshold=0.9, max_batch=1, compile=False)


@pytest.fixture(scope="module")
def pipe() -> SGLPipeline:
    return SGLPipeline.from_pretrained(tiny.SMALL, tiny.LARGE, config=CONFIG)


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Any]:
    with browser(tmp_path / "profile", 1280, 900) as driver:
        driver.get(address)
        yield driver


def wait(page: Any, condition: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, 60).until(lambda driver: driver.execute_script(f"return {condition}"))


def text(page: Any, name: str) -> str:
    return page.find_element("id", name).text


def ask(page: Any, image: str, prompt: str) -> None:
    """Fill in the form as a user does, press the button and wait for the end."""
    page.find_element("id", "image").send_keys(image)
    page.find_element("id", "prompt").clear()
    page.find_element("id", "prompt").send_keys(prompt)
    page.find_element("id", "ask").click()
    wait(page, "document.getElementById('ask').disabled === false")


def move(page: Any, name: str, value: float) -> None:
    page.execute_script(
        "const slider = document.getElementById(arguments[0]); slider.value = arguments[1];"
        "slider.dispatchEvent(new Event('input'))",
        name,
        value,
    )


def complaints(page: Any) -> list[str]:
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def hosts(page: Any) -> set[str | None]:
    """Hosts that anything on the page was asked of."""
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.endswith("/page.js") for url in sent)
    return {urlsplit(url).hostname for url in sent if urlsplit(url).scheme not in INSIDE}


def test_an_uploaded_picture_is_answered(page: Any, pipe: SGLPipeline) -> None:
    sample = SAMPLES[0]
    expected = pipe(sample["image"], sample["prompt"])
    ask(page, sample["image"], sample["prompt"])
    assert text(page, "text") == expected.text == sample["answer"]
    assert "large VLM answered" in text(page, "who")
    assert text(page, "score") == f"{expected.decision_score:.3f}"
    pictures = page.find_elements("css selector", ".panels img")
    assert len(pictures) == 2
    for picture in pictures:
        assert picture.get_property("naturalWidth") == 768
        assert picture.get_attribute("alt")
    stages = [row.text for row in page.find_elements("css selector", "#stages tbody th")]
    assert stages == [stage.replace("_", " ") for stage in expected.timings]
    times = [cell.text for cell in page.find_elements("css selector", "#stages td")]
    assert sum(float(milliseconds) for milliseconds in times) > 0
    assert complaints(page) == []
    assert hosts(page) == {"127.0.0.1"}


def test_one_click_asks_an_example(page: Any, pipe: SGLPipeline) -> None:
    sample = SAMPLES[2]
    page.find_elements("css selector", ".example")[2].click()
    wait(page, "document.getElementById('text') !== null")
    expected = pipe(sample["image"], sample["prompt"])
    assert text(page, "text") == expected.text
    assert ("small VLM alone" in text(page, "who")) == expected.exited
    assert page.find_element("id", "preview").get_property("naturalWidth") > 0
    assert complaints(page) == []


def test_sliders_and_ticks_count(page: Any, pipe: SGLPipeline) -> None:
    sample = SAMPLES[1]
    move(page, "keep_ratio", 0.5)
    move(page, "prune_layer", 4)
    page.find_element("id", "exits").click()
    page.find_element("name", "unpruned").click()
    assert page.find_element("css selector", "output[for=exit_threshold]").text == "never"
    ask(page, sample["image"], sample["prompt"])
    config = SGLConfig(keep_ratio=0.5, prune_layer=4, max_batch=1, compile=False)
    assert text(page, "text") == pipe.with_config(config)(sample["image"], sample["prompt"]).text
    captions = [caption.text for caption in page.find_elements("css selector", "figcaption")]
    assert captions[-1].lower() == "large vlm sees 128 of 256 tokens"
    assert len(page.find_elements("css selector", "svg.bar")) == 2
    assert text(page, "unpruned")
    page.find_element("id", "exits").click()
    move(page, "exit_threshold", 0)
    ask(page, sample["image"], sample["prompt"])
    assert "small VLM alone" in text(page, "who")
    assert complaints(page) == []


def test_a_text_called_png_is_told_in_words(page: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.png"
    wrong.write_text("this is no picture")
    ask(page, str(wrong), "what is it")
    expected = "The image of 18 bytes is not an image in PNG, JPEG, WEBP, GIF, BMP, TIFF."
    assert text(page, "error") == expected
    assert page.find_elements("css selector", ".panels img") == []
    [refused] = complaints(page)  # Chromium's own note that the request was refused
    assert "400 (Bad Request)" in refused
    ask(page, SAMPLES[1]["image"], SAMPLES[1]["prompt"])
    assert text(page, "error") == ""
    assert text(page, "text") == SAMPLES[1]["answer"]


def test_without_picture_or_question_it_says_what_to_do(page: Any) -> None:
    page.find_element("id", "ask").click()
    wait(page, "!document.getElementById('error').hidden")
    assert text(page, "error") == "There is no question: write one, or press one of the examples."
    page.find_element("id", "prompt").send_keys("what is it\n")  # Enter asks
    wait(page, "document.getElementById('error').textContent.includes('picture')")
    assert text(page, "error") == "There is no picture: choose one, or press one of the examples."


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_sticks_out(address: str, tmp_path: Path, width: int) -> None:
    with browser(tmp_path / "profile", width, 800) as page:
        page.get(address)
        ask(page, SAMPLES[0]["image"], SAMPLES[0]["prompt"])
        assert page.execute_script("return document.documentElement.scrollWidth") == width


def test_every_control_has_a_name_and_the_keyboard_reaches_it(page: Any) -> None:
    from selenium.webdriver import ActionChains, Keys

    names = [c.accessible_name for c in page.find_elements("css selector", "button, input, textarea")]
    reached = []
    for _ in names:
        ActionChains(page).send_keys(Keys.TAB).perform()
        reached.append(page.switch_to.active_element.accessible_name)
    assert all(names)
    assert reached == names
