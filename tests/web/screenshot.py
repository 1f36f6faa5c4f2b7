"""Write docs/images/web.png: ``python -m tests.web.screenshot [--out FILE] [--width N] [--dark]``."""

from __future__ import annotations

import argparse
import base64
import io
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from sgl_runtime.files import whole_file
from tests.web.served import browser, served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/web.png"))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    with (
        served() as (address, _),
        tempfile.TemporaryDirectory() as profile,
        browser(Path(profile), arguments.width, 900, dark=arguments.dark) as page,
    ):
        page.get(address)
        picture = asked(page)
    with whole_file(arguments.out) as partial:
        # 256 colours are half of the bytes; this method keeps those of small areas, the bars' among them.
        picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            partial, format="PNG", optimize=True
        )


def asked(page: Any) -> Image.Image:
    """Ask the first example, with the unpruned large VLM beside, and return all of the page."""
    from selenium.webdriver.support.ui import WebDriverWait

    page.find_element("name", "unpruned").click()
    for _ in range(2):  # the second time the browser itself is done with starting
        page.find_element("css selector", ".example").click()
        WebDriverWait(page, 60).until(
            lambda page: page.find_elements("css selector", "#result:not(.old) table")
        )
        time.sleep(2)
    size = {"width": 0, "height": 0, "deviceScaleFactor": 0, "mobile": False}
    size |= page.execute_script("return {width: innerWidth, height: document.documentElement.scrollHeight}")
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    shot = page.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


if __name__ == "__main__":
    main()
