"""One of the processes that ``together`` starts: runs a function of a test file with its place in the environment."""

from __future__ import annotations

import os
import pickle
import runpy
from pathlib import Path
from typing import Any

JOB: dict[str, Any] = globals()["JOB"]  # given by who starts it

os.environ.update(JOB["environment"])
os.chdir(JOB["folder"])
for stream, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{JOB['kept']}.{name}", os.O_WRONLY | os.O_CREAT), stream)
value = runpy.run_path(JOB["file"])[JOB["function"]](*JOB["args"])
Path(f"{JOB['kept']}.pickle").write_bytes(pickle.dumps(value))
