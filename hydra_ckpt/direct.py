"""Writing past the page cache.

A checkpoint is not read again soon. Through the page cache its bytes are copied there, push out what will be, and go to
the device later; and ranks that fill one file take turns at copying, because the kernel locks the file for it. Whole
pages written with `O_DIRECT` go to the device at once, from several ranks side by side.

A page must not be written both ways at a time; its neighbours may, for both ways lock the file against each other. A
memory map does not: where the kernel keeps neighbouring pages as one, it would write all of them back. A caller that
opens a file for this knows that nobody maps it for writing.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from pathlib import Path

import numpy as np

PAGE = 4096
# Where ranks may write to one file side by side; others lock it, copy after all, or were never tried.
KINDS = ("ext4", "xfs")
# Large enough for a device to be busy, small enough for the processor's cache: what is copied is digested next.
_CHUNK = 4 << 20
_CHUNKS = 3


class DirectWriter:
    """Writes whole pages to a file, from memory of any alignment, while the caller prepares the next ones.

    Args:
        path: An existing file.
        descriptor: The same file, open for ordinary writes: for what the device will not take.

    Raises:
        OSError: The file system does not offer it, or there is no memory.
        RuntimeError: No thread can be started.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._ordinary = descriptor
        self._error: BaseException | None = None
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[tuple[int, np.ndarray, int] | None] = queue.SimpleQueue()
        memory = np.frombuffer(mmap.mmap(-1, _CHUNKS * _CHUNK), np.uint8)
        for start in range(0, _CHUNKS * _CHUNK, _CHUNK):
            self._free.put(memory[start : start + _CHUNK])
        self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
        # A daemon: the writer waits for it in `flush`, so it needs no separate protection from the program's end.
        self._thread = threading.Thread(target=self._run, name="hydra_ckpt-direct", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            os.close(self._direct)
            raise

    def write(self, offset: int, data: memoryview) -> None:
        """Take over whole pages that belong from a multiple of `PAGE` on; `data` may change afterwards.

        Raises:
            OSError: The device has not taken what came before.
        """
        source = np.frombuffer(data, np.uint8)
        for start in range(0, len(source), _CHUNK):
            piece = source[start : start + _CHUNK]
            buffer = self._free.get()
            if self._error is not None:
                self._free.put(buffer)
                raise self._error
            np.copyto(buffer[: len(piece)], piece)  # lets other threads run, unlike a memoryview
            self._filled.put((offset + start, buffer, len(piece)))

    def flush(self) -> None:
        """Return when the device has taken all of it.

        Raises:
            OSError: It has not.
        """
        buffers = [self._free.get() for _ in range(_CHUNKS)]
        for buffer in buffers:
            self._free.put(buffer)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close the file."""
        self._filled.put(None)
        self._thread.join()
        os.close(self._direct)

    def _run(self) -> None:
        while (filled := self._filled.get()) is not None:
            offset, buffer, size = filled
            try:
                if self._error is None:
                    self._write(offset, buffer[:size].data)
            except BaseException as error:  # noqa: BLE001 - raised by `write` or `flush`, in the thread that waits
                self._error = error
            finally:
                self._free.put(buffer)

    def _write(self, offset: int, view: memoryview) -> None:
        descriptor = self._direct
        while view:
            try:
                count = os.pwrite(descriptor, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or descriptor == self._ordinary:
                    raise
                descriptor = self._ordinary  # the device wants another alignment
                continue
            offset, view = offset + count, view[count:]
            if count % PAGE:
                descriptor = self._ordinary
