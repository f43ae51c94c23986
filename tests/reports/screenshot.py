"""Make a PNG of a report.html, as the browser tests see it:

python -m tests.reports.screenshot DIR/report.html report.png [--width 360] [--dark]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from .browser import Browser


def main() -> None:
    """Parse the command line and write the PNG."""
    parser = argparse.ArgumentParser(description="Make a PNG of a report.html.")
    parser.add_argument("page", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--width", type=int, default=1200, help="in pixels; a phone up to 600")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        browser.look(width=given.width, dark=given.dark)
        browser.open(given.page)
        browser.screenshot(given.png)


if __name__ == "__main__":
    main()
