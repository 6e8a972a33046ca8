"""The examples run, and differ by one line from what they would be with the original."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from originals import original

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("name, library", [("lightly_simclr", "lightly"), ("open_clip_train", "open_clip")])
def test_example(name, library, tmp_path):
    original(library)
    path = EXAMPLES / f"{name}.py"
    changed = [line for line in path.read_text().splitlines() if "sslfast" in line]
    assert len(changed) == 1 and re.search(rf"# was: from {library}[\w.]* import", changed[0])
    command = [sys.executable, str(path), "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r": (0\.\d+), untrained (0\.\d+)", done.stdout)
    assert found and float(found[1]) > 0.05
