"""Imported first by the scripts: Ctrl-C ends them at once while they load their libraries.

That takes seconds. Python's own answer would be a traceback through half of PyTorch, or none at all
where a library swallows the exception. `functions.exit_cleanly` takes over from here.
"""

import signal
import sys
from pathlib import Path

script = getattr(sys.modules["__main__"], "__file__", None)
if script and Path(script).resolve().parent == Path(__file__).resolve().parent:  # not on import
    signal.signal(signal.SIGINT, signal.SIG_DFL)
