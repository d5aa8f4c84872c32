"""Pages in a headless browser: a script is put at their end, and what they then show is read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: where the script puts what it found
RESULT = "test-result"


def browser() -> str:
    """A browser's command; the test is skipped where none is installed."""
    found = next((f for f in map(shutil.which, NAMES) if f), None)
    if found is None:
        pytest.skip(f"no browser installed (looked for {', '.join(NAMES)})")
    return found


def run(
    page: Path, script: str, folder: Path, width: int = 1280, height: int = 900, dark: bool = False
) -> str:
    """What `say(text)` of the script was given, with the page loaded, of this size and theme.

    Fails on anything in the console, an error of the script among it.
    """
    put = folder / f"with-script-{width}-{dark}.html"
    head = f"const said = []; const say = (x) => said.push(String(x));\n{script}\n"
    tail = (
        "const made = document.createElement('pre'); "
        f"made.id = '{RESULT}'; made.textContent = said.join('\\n'); document.body.append(made);"
    )
    text = page.read_text(encoding="utf-8")
    body, end = text.rsplit("</body>", 1)
    put.write_text(f"{body}<script>{{{head}{tail}}}</script></body>{end}", encoding="utf-8")
    done = subprocess.run(
        [
            browser(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=4000",
            "--enable-logging=stderr",
            "--v=0",
            "--dump-dom",
            put.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    _, _, rest = done.stdout.partition(f'<pre id="{RESULT}">')
    assert rest, "the script did not come to its end"
    return rest.partition("</pre>")[0]
