"""Values that one background thread makes before they are asked for."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

_Value = TypeVar("_Value")

_PATIENCE_S = 5.0
"""How long the end waits for the value that is being made."""


class Ahead(Generic[_Value]):
    """``make(key)``, one at a time in a background thread, of which the last few asked for are kept.

    For one calling thread: only ``make`` runs in the background. That thread is a daemon, so that nothing waits long
    for a download when the process ends; an idle one is waited for, since a thread that is still there while Python
    takes itself down aborts the process when it lets go of an object of C++.

    Args:
        make: makes a value. What it raises is raised by :meth:`get`. The thread keeps it alive: it must not refer back
            to the owner of this object, or neither would ever go.
        capacity: number of values to keep.
        discard: what to do with a value that is dropped; the caller may not use it any more.
    """

    def __init__(self, make: Callable[[int], _Value], capacity: int, discard: Callable[[_Value], None]) -> None:
        self._capacity = capacity
        self._discard = discard
        self._futures: OrderedDict[int, Future[_Value]] = OrderedDict()
        self._queue: SimpleQueue[tuple[int, Future[_Value]] | None] = SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._queue, make), daemon=True)
        thread.start()
        weakref.finalize(self, _finish, thread, self._queue, self._futures, discard)

    def request(self, keys: Iterable[int]) -> None:
        """Have values made, if they are not there already."""
        for key in keys:
            self._future(key)

    def get(self, key: int) -> _Value:
        """The value, as soon as it is made. It stays until ``capacity`` other keys have been asked for."""
        return self._future(key).result()

    def _future(self, key: int) -> Future[_Value]:
        if key not in self._futures:
            self._futures[key] = Future()
            self._queue.put((key, self._futures[key]))
        self._futures.move_to_end(key)
        while len(self._futures) > self._capacity:
            _drop(self._futures.popitem(last=False)[1], self._discard)
        return self._futures[key]


def _work(queue: "SimpleQueue[tuple[int, Future[_Value]] | None]", make: Callable[[int], _Value]) -> None:
    while (item := queue.get()) is not None:
        key, future = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(make(key))
            except BaseException as error:
                future.set_exception(error)
        del item, future  # not kept alive while waiting for the next


def _finish(
    thread: threading.Thread,
    queue: "SimpleQueue[tuple[int, Future[_Value]] | None]",
    futures: OrderedDict[int, Future[_Value]],
    discard: Callable[[_Value], None],
) -> None:
    for future in futures.values():
        _drop(future, discard)
    queue.put(None)
    thread.join(_PATIENCE_S)


def _drop(future: Future[_Value], discard: Callable[[_Value], None]) -> None:
    """Discard a value now, when it will have been made, or never if that has not begun."""

    def made(done: Future[_Value]) -> None:
        if done.exception() is None:
            discard(done.result())

    if not future.cancel():
        future.add_done_callback(made)
