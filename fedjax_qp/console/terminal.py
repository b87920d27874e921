"""Signals, and a terminal that may go away: how a command ends in order, or outlives its terminal.

A signal is noticed at once, also while the device works or a program is compiled: a thread of its own reads the pipe that
the system writes it to. Before a run's first round, and in every other command, it ends the process then and there: nothing
is lost, since all files are written whole. `listening` gives it another meaning for a while.

Imports nothing but Python itself, so that the imports of everything else are under its guard.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

INTERRUPTED = 130
_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_takers: list[Callable[[str], None]] = []  # the last one gets the next signal
_guarded = False


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Watches over a whole command; within another one it does nothing."""
    global _guarded
    if _guarded or threading.current_thread() is not threading.main_thread():
        yield
        return
    _open_standard_files()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)
    _guarded = True
    try:
        with _watched():
            yield
    except KeyboardInterrupt:
        leave("interrupted")
    finally:
        _guarded = False
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = streams


@contextlib.contextmanager
def listening(take: Callable[[str], None]) -> Iterator[None]:
    """Has signals call `take` with their names, from another thread where a command is guarded."""
    _takers.append(take)
    try:
        with contextlib.nullcontext() if _guarded else _handled(lambda number, _: take(signal.Signals(number).name)):
            yield
    finally:
        _takers.remove(take)


def leave(sentence: str) -> None:
    """Ends the process at once; where no command is guarded (a notebook), raises KeyboardInterrupt."""
    if not _guarded:
        raise KeyboardInterrupt(sentence)
    if sys.stdout is not None and sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")  # a progress bar has hidden the cursor
        sys.stdout.flush()
    print(sentence, file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Reads signals in a thread of its own."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        with _handled(lambda number, _: None):
            watcher.start()
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)  # which ends the watcher
        watcher.join()
        os.close(reading)


def _watch(reading: int) -> None:
    while numbers := os.read(reading, 1):
        with contextlib.suppress(ValueError):  # a number without a name
            number = signal.Signals(numbers[0])
            if number in _SIGNALS:
                _deliver(number.name)


def _deliver(name: str) -> None:
    """Never raises: without the thread that calls it no signal would end the process but SIGKILL."""
    try:
        last = _takers[-1:]  # the main thread may remove it at any moment
        if last:
            last[0](name)
        else:
            leave(f"{name}: left; nothing is lost, give the same command again")
    except Exception as error:
        leave(f"{name}: left at once ({error})")


def take_back() -> None:
    """Puts Python's handlers in their place again after a library has put its own there behind Python's back."""
    with contextlib.suppress(ValueError):  # not the main thread
        for number in _SIGNALS:
            if (handler := signal.getsignal(number)) is not None:  # None is nobody's that Python knows
                signal.signal(number, handler)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Puts a handler in the place of the signals' own, but for a SIGHUP that is ignored (nohup)."""
    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: somebody else owns the signals
        for number in _SIGNALS:
            if number is signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _open_standard_files() -> None:
    """A closed standard file would give its number to the next file that is opened, and a library's words to that file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _outliving(stream: Any) -> Any:
    return None if stream is None else OutlivingStream(stream)


class OutlivingStream:
    """A text stream that is silent from its first failure on, and shows what its encoding lacks as question marks."""

    def __init__(self, stream: TextIO):
        self._stream, self._lost = stream, False
        with contextlib.suppress(AttributeError, ValueError):  # a stream of another kind
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]

    def write(self, text: str) -> int:
        """As a text stream's, but for its failures."""
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a text stream's, but for its failures."""
        with self._kept():
            self._stream.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        if self._lost:
            with contextlib.suppress(OSError, ValueError):
                yield
            return
        try:
            yield
        except (OSError, ValueError) as error:
            self._lost = True
            self._to_nowhere()
            if not isinstance(error, BrokenPipeError) and sys.stderr is not self:
                print(f"the output is lost from here on ({error}); files are written all the same", file=sys.stderr)

    def _to_nowhere(self) -> None:
        """What the stream still holds would fail again when Python ends."""
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream of another kind has no number
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
