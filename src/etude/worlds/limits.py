"""A time limit on a call, for verifiers and rewards that other people wrote."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

AGAIN = 0.2  # seconds after which a call that swallowed the first interruption is interrupted again


class TimeLimit(Exception):
    """A call took longer than it may."""


class _Ring(BaseException):
    """Raised inside the call that ran too long. Not an Exception, so that the call cannot swallow it."""


def within(seconds: float, f: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """`f(*args, **kwargs)`, or TimeLimit once `seconds` are over. Whatever `f` raises is passed on.

    In the main thread an interval timer interrupts the call; a timer that was already running goes on
    afterwards. In other threads the call runs in a thread of its own. Neither can break into a single
    operation that holds the interpreter (9**9**9): refuse such input before.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _by_timer(seconds, f, args, kwargs)
    return _by_thread(seconds, f, args, kwargs)


def _by_timer(seconds: float, f: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    def ring(signum: int, frame: FrameType | None) -> None:
        raise _Ring

    def restore() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - began), 1e-3), interval)

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        try:
            return f(*args, **kwargs)
        finally:
            restore()
    except _Ring:
        restore()  # it may have rung before the line above
        raise TimeLimit(f"took longer than {seconds:g} s") from None


def _by_thread(seconds: float, f: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(f(*args, **kwargs))
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
    if errors:
        raise errors[0]
    if results:
        return results[0]
    # Ends the call at its next bytecode; one that is blocked in C is left behind as a daemon.
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(_Ring))
    raise TimeLimit(f"took longer than {seconds:g} s")
