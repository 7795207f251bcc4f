"""Items made in a thread of their own, so that the thread that trains only takes them."""

import atexit
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

_Item = TypeVar("_Item")

# Items that lie ready, on the device, when the next one is asked for.
_READY = 1


def fed(
    items: Generator[_Item, None, None],
    *,
    tensors: Callable[[_Item], Iterable[torch.Tensor]],
    stream: "torch.cuda.Stream | None" = None,
) -> Iterator[_Item]:
    """The items of a generator, which runs in a thread of its own and stays an item ahead. Raises what it raises.

    The thread starts when the first item is taken and has ended when this iterator is exhausted or closed.
    stream: on a GPU, the stream on which the thread computes and copies. The `tensors` of an item are for use on the
    stream that is current where it is taken, which waits for what made this item and for nothing that was begun after
    it; the host does not wait.
    """
    feeder = _Feeder(items, tensors, stream)
    try:
        # Without a variable that would keep an item, whose memory is used again, while the next one is waited for.
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
            # What the items are made from may have been brought to the device just now.
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        for _ in range(_READY):
            self._wanted.put(None)
        # The interpreter waits for other threads for ever, and ends a daemon in the middle of what it does.
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        atexit.register(self.stop)
        self._thread.start()

    def take(self) -> _Item | None:
        """The next item; None after the last one."""
        self._wanted.put(None)
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        item, ready = made
        if item is not None and ready is not None:
            current = torch.cuda.current_stream(ready.device)
            current.wait_event(ready)
            for tensor in self._tensors(item):
                # Its memory must not be given away before what the current stream does with it has ended.
                tensor.record_stream(current)
        return item

    def stop(self) -> None:
        """Ends the thread, after what it is making now. Nothing is taken after this."""
        self._stopped = True
        self._wanted.put(None)
        self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        try:
            # On a CPU, a context of no stream does nothing.
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
