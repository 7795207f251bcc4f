"""Makes items ahead of their use in a separate thread, so that the training thread only takes them."""

import atexit
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

_Item = TypeVar("_Item")

# Items that are made ahead.
_READY = 1


def fed(
    items: Generator[_Item, None, None],
    *,
    tensors: Callable[[_Item], Iterable[torch.Tensor]],
    stream: "torch.cuda.Stream | None" = None,
) -> Iterator[_Item]:
    """Yields the items of a generator, which runs one item ahead in a separate thread; raises what it raises.

    The thread starts when the first item is taken, and ends when this iterator is exhausted or closed.
    tensors: returns the tensors of an item. stream: on a GPU, the stream of the thread's work. The stream that is
    current when an item is taken waits for the work that made this item, but not for later work; the host does not
    wait.
    """
    feeder = _Feeder(items, tensors, stream)
    try:
        # Not a loop with a variable: that would keep an item, and its reusable memory, while waiting for the next one.
        yield from iter(feeder.take, None)
    finally:
        feeder.stop()


class _Feeder(Generic[_Item]):
    def __init__(
        self,
        items: Generator[_Item, None, None],
        tensors: Callable[[_Item], Iterable[torch.Tensor]],
        stream: "torch.cuda.Stream | None",
    ):
        self._items, self._tensors, self._stream = items, tensors, stream
        self._stopped = False
        self._wanted: SimpleQueue[None] = SimpleQueue()
        self._made: SimpleQueue[tuple[_Item | None, torch.cuda.Event | None] | BaseException] = SimpleQueue()
        if stream is not None:
            # The inputs of the items may have been copied to the device just before.
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        for _ in range(_READY):
            self._wanted.put(None)
        # At exit, Python would wait forever for a normal thread and kill a daemon at any point of its work; so this is
        # a daemon that is stopped at exit.
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        atexit.register(self.stop)
        self._thread.start()

    def take(self) -> _Item | None:
        """Returns the next item; None after the last one."""
        self._wanted.put(None)
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        item, ready = made
        if item is not None and ready is not None:
            current = torch.cuda.current_stream(ready.device)
            current.wait_event(ready)
            for tensor in self._tensors(item):
                # Its memory must not be reused before the current stream has finished using it.
                tensor.record_stream(current)
        return item

    def stop(self) -> None:
        """Ends the thread after its current item. No items can be taken after this."""
        self._stopped = True
        self._wanted.put(None)
        self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        try:
            # On a CPU the stream is None, and this context does nothing.
            with torch.cuda.stream(self._stream), closing(self._items):
                while self._wanted.get() is None and not self._stopped:
                    item = next(self._items, None)
                    ready = None if self._stream is None else self._stream.record_event()
                    self._made.put((item, ready))
                    if item is None:
                        return
                    del item
        except BaseException as error:
            self._made.put(error)
