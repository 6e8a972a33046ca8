"""The examples run, and differ by one line from what they would be with the original."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from originals import original

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


# Features of an untrained network already tell most of these digits apart; captions have to be learned.
@pytest.mark.parametrize(
    "name, library, epochs, least",
    [("lightly_simclr", "lightly", 1, 0.9), ("open_clip_train", "open_clip", 6, 0.5)],
)
def test_example(name, library, epochs, least, tmp_path):
    original(library)
    path = EXAMPLES / f"{name}.py"
    changed = [line for line in path.read_text().splitlines() if "sslfast" in line]
    assert len(changed) == 1 and re.search(rf"# was: from {library}[\w.]* import", changed[0])
    command = [sys.executable, str(path), "--epochs", str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r": (0\.\d+), untrained 0\.\d+", done.stdout)
    assert found and float(found[1]) > least, done.stdout[-300:]
