"""The name of this machine's processor, as results are filed under it."""

import os
import platform
import re
from pathlib import Path


def cpu_name() -> str:
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = model.group(1) if model else platform.machine()
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("(r)", "")).strip("-") + f"-{os.cpu_count()}cpu"
