import contextlib
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import threadpoolctl
import torch
from pictures import unrendered

from support.errors import UserError

# The files that take longest: a worker that began one of them last would leave the other idle.
LONG = ("notebook", "few_labels", "rnn_hyperparameter_tune", "sweep", "distributed")
LONG += ("simclr_hyperparameter_tune", "functions", "embed", "simclr", "moco", "simsiam")


def pytest_collection_modifyitems(items):
    """Long files first."""
    names = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: [*names, item.path.stem].index(item.path.stem))


@pytest.fixture(autouse=True, scope="session")
def ctrl_c():
    """Let Ctrl-C reach the processes that tests start.

    A shell that starts the tests in the background has it ignored, and children inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # On a busy machine threads that wait for each other make tiny tests a hundred times slower.
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)


@pytest.fixture
def signals():
    """Signals as a script in a terminal finds them; afterwards as they were."""
    terminate = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM was not handled"))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    user, hook = signal.getsignal(signal.SIGUSR1), sys.unraisablehook
    yield
    sys.unraisablehook = hook
    signal.signal(signal.SIGUSR1, user)
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, interrupt)


@pytest.fixture
def run_here(signals):
    """Stands in for `subprocess.run` of a script: this process has PyTorch, a new one imports it.

    The file runs as `__main__` with its flags, so nothing but the new process is left out.
    """

    def run(command):
        interpreter, *words = command
        assert interpreter == sys.executable
        code = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            try:
                runpy.run_path(words[0], run_name="__main__")
            except SystemExit as end:
                code = end.code
        return subprocess.CompletedProcess(command, code)

    return run


@pytest.fixture
def unrendered_pictures():
    """For a test of a whole run that looks at no picture."""
    with unrendered():
        yield


@pytest.fixture
def user_error():
    """A context that demands a `UserError` of one line that holds every word."""

    @contextlib.contextmanager
    def context(*words):
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        for word in words:
            assert str(word) in message

    return context


@pytest.fixture
def small_disk(capsys):  # which keeps pytest's own record of the output off the disk
    """A context in which no file can grow beyond some bytes, as on a disk that fills up."""

    @contextlib.contextmanager
    def context(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return context


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium that logs what it says and what it asks for."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no browser: on Debian, apt-get install chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "window-size=1300,800", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument("--enable-unsafe-swiftshader")  # WebGL without a graphics card
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as started:
        yield started
