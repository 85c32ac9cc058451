"""Tasks in several processes of this machine, each with its share of the threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import threadpoolctl
import torch

from support import runs
from support.errors import UserError

_work: Callable[[Any], Any] | None = None  # of this worker, which has made it for its first task


def begin_worker(workers: int) -> None:
    """Let this process, one of so many workers, end with its parent and leave them their threads.

    Ctrl-C in a terminal reaches all processes; the parent answers for all.
    """

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow_parent, daemon=True).start()
    runs.show_lines_at_once()
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)  # those of NumPy and SciPy


@contextlib.contextmanager
def blocking_ctrl_c() -> Iterator[None]:
    """Start processes that do not hear Ctrl-C, which in a terminal reaches all of them.

    The one that starts them answers for all. Windows cannot block it.
    """
    can_block = hasattr(signal, "pthread_sigmask")
    if can_block:
        multiprocessing.resource_tracker.ensure_running()  # its start would lift the block
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def run_tasks(
    make_work: Callable[[], Callable[[Any], Any]], tasks: Sequence[Any], workers: int
) -> Iterator[Any]:
    """The results of all tasks, each as soon as it is there; with one worker in order.

    Args:
        make_work: makes the function of a task, once per process; workers get it pickled, as they
            get the tasks.
        tasks: in the order in which they are begun.
        workers: processes; a single one is this one.

    Raises:
        UserError: a task raised it, or a worker was killed.
    """
    if workers == 1:
        yield from map(make_work(), tasks)
        return
    others = multiprocessing.active_children()  # of a notebook, say
    context = multiprocessing.get_context("spawn")
    executor = futures.ProcessPoolExecutor(workers, context, begin_worker, (workers,))
    try:
        with blocking_ctrl_c():
            begun = [executor.submit(_do, make_work, task) for task in tasks]
        for future in futures.as_completed(begun):
            yield future.result()
    except futures.process.BrokenProcessPool as error:
        raise UserError(
            "a worker was killed: if the memory is full, use fewer --workers"
        ) from error
    finally:
        for process in set(multiprocessing.active_children()).difference(others):
            process.kill()
        executor.shutdown(cancel_futures=True)


def _do(make_work: Callable[[], Callable[[Any], Any]], task: Any) -> Any:
    global _work
    _work = _work or make_work()
    return _work(task)
