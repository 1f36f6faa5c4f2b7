"""`sgl-vlm demo --web` as a process of its own, and a browser to look at it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

COMMAND = [sys.executable, "-m", "sgl_runtime.cli", "demo", "--web", "--port", "0"]
_OFFLINE = (  # else Chromium itself calls Google's hosts
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
)


@contextmanager
def served(
    *options: str, environment: dict[str, str] | None = None, complaints: IO[str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the command, its stderr in a file, and give the address that it prints, and its process."""
    process = subprocess.Popen(
        [*COMMAND, *options],
        stdout=subprocess.PIPE,
        stderr=complaints,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+:\d+", line)
        assert found, f"the command ended with {process.wait()} after {line!r}"
        yield found.group(), process
    finally:
        process.kill()
        process.wait()


def missing_browser() -> str | None:
    """Return why there is no browser to test with, if so."""
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"{name} is not installed: apt-get install chromium chromium-driver"
    return None


@contextmanager
def browser(profile: Path, width: int, height: int, *, dark: bool = False) -> Iterator[Any]:
    """Give headless Chromium, its profile in an empty directory, with the logs that tests read."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *_OFFLINE]
    for argument in [*arguments, f"--user-data-dir={profile}", "--hide-scrollbars"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()
