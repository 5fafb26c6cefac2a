"""The directory of packed weights: one worker of a machine packs a model's matrices, all map the file that it wrote.

A file is named after what it holds. While it is written it is called `.partial`, and its writer holds a lock on it;
others wait, and when the writer dies the kernel drops the lock and the next one begins anew. Whoever has mapped a
finished file holds a shared lock on it, so that files are deleted only when nobody uses them.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Final

from engine.cpu.packed import Packed
from engine.cpu.weight_file import FORMAT, WeightFileWriter, open_weight_file
from engine.errors import WeightFileRefused
from fleet.logs import get_logger

LEAST_BYTES: Final = 64 * 2**20
"""A model whose matrices take less is packed by every worker for itself: nothing is gained by a file."""
KEPT_FILES: Final = 4
KEPT_BYTES: Final = 50 * 10**9
"""What unused files may take, the least recently used going first; and how many files there are at most."""
_LOOK_S: Final = 0.05
SILENCE_S: Final = 60.0
_FINISHED: Final = ".weights"
_PARTIAL: Final = ".partial"

_log = get_logger("weight_cache")


class PackedWeights:
    """A model's packed matrices by name while it is loaded: found in a file, added to one, or packed for us alone."""

    def __init__(self, found: Mapping[str, Packed] | None = None, writer: WeightFileWriter | None = None) -> None:
        self._found = found or {}
        self._writer = writer

    def matrix(self, name: str, pack: Callable[[], Packed]) -> Packed:
        """What the file holds under this name; else what `pack` makes, in the file if one is being written."""
        if name in self._found:
            return self._found[name]
        packed = pack()
        if self._writer is None:
            return packed
        try:
            return self._writer.add(name, packed)
        except OSError as error:
            self._writer = None
            _log_own_memory(error)
            return packed

    def finish(self) -> bool:
        """Whether a file was written, and is whole."""
        if self._writer is None:
            return False
        try:
            self._writer.finish()
        except OSError as error:
            _log_own_memory(error)
            return False
        return True


class WeightCache:
    """Files of packed weights in one directory, which only this user may write to."""

    def __init__(self, directory: Path, *, least_bytes: int = LEAST_BYTES, silence_s: float = SILENCE_S) -> None:
        """Nothing is made before it is needed.

        Args:
            directory: may not exist yet.
            least_bytes: models with less than this are packed by every worker for itself.
            silence_s: a writer that has not written for this long is waited for no more.
        """
        self._directory = directory
        self._least_bytes = least_bytes
        self._silence_s = silence_s

    @contextmanager
    def opened(
        self, what: str, num_bytes: int, *, meanwhile: Callable[[], None] = lambda: None
    ) -> Iterator[PackedWeights]:
        """The packed matrices of one model, to be asked for all of them while this lasts.

        Where a file can be neither used nor written, a line is logged and matrices are packed into own memory.

        Args:
            what: names layout and values of the matrices.
            num_bytes: that they take, about.
            meanwhile: called before another worker is waited for that writes the file.
        """
        if num_bytes < self._least_bytes:
            yield PackedWeights()
            return
        name = blake2b(f"{FORMAT} {what}".encode(), digest_size=16).hexdigest()
        try:
            _make_private(self._directory)
            found = self._found_or_locked(name, meanwhile)
        except (OSError, ValueError, WeightFileRefused) as error:
            _log_own_memory(error)
            yield PackedWeights()
            return
        if isinstance(found, int):
            with self._writing(found, name, num_bytes) as weights:
                yield weights
        else:
            yield PackedWeights(found)

    def _found_or_locked(self, name: str, meanwhile: Callable[[], None]) -> dict[str, Packed] | int:
        """The matrices of the finished file; or a descriptor of the partial one, empty and locked until it is closed.

        Waits for whoever is writing it. Raises OSError, and WeightFileRefused if the writer has stopped writing.
        """
        finished, partial = self._directory / (name + _FINISHED), self._directory / (name + _PARTIAL)
        while True:
            found = _open_finished(finished, name)
            if found is not None:
                return found
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                if self._lock(descriptor, partial, meanwhile):
                    found = _open_finished(finished, name)  # it may have come while we looked
                    if found is None:
                        os.ftruncate(descriptor, 0)
                        return os.dup(descriptor)
                    partial.unlink()
                    return found
            finally:
                os.close(descriptor)

    def _lock(self, descriptor: int, path: Path, meanwhile: Callable[[], None]) -> bool:
        """Lock the partial file for writing once nobody else does; False when `path` is another file by then."""
        seen, since_s = 0, time.monotonic()
        said = False
        while not _try_lock(descriptor):
            if not _is_at(descriptor, path):
                return False
            if not said:
                _log.info("another worker is packing the weights, waiting for its file", file=str(path))
                meanwhile()
                said = True
            written = os.fstat(descriptor).st_mtime_ns
            if written != seen:
                seen, since_s = written, time.monotonic()
            elif time.monotonic() - since_s > self._silence_s:
                raise WeightFileRefused(f"{path}: its writer has not written for {self._silence_s:.0f} s")
            time.sleep(_LOOK_S)
        return _is_at(descriptor, path)

    @contextmanager
    def _writing(self, descriptor: int, name: str, num_bytes: int) -> Iterator[PackedWeights]:
        """A file while it is written; it gets its name if all of it could be, and is gone otherwise."""
        finished, partial = self._directory / (name + _FINISHED), self._directory / (name + _PARTIAL)
        is_named = False
        try:
            self._delete_unused(finished)
            weights = _begun(descriptor, name, num_bytes)
            yield weights
            with suppress(OSError):
                if weights.finish():
                    partial.replace(finished)
                    is_named = True
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    _log.info("weights packed into a file for all workers of this machine", file=str(finished))
        finally:
            if not is_named:
                with suppress(OSError):
                    partial.unlink()
            os.close(descriptor)

    def _delete_unused(self, coming: Path) -> None:
        """What dead writers left, and finished files beyond the bounds that nobody uses, least recently used first."""
        for path in self._directory.glob("*" + _PARTIAL):
            _delete_unless_locked(path)
        others = [path for path in self._directory.glob("*" + _FINISHED) if path != coming]
        with suppress(OSError):  # another worker may be deleting too
            abouts = sorted(((path.stat(), path) for path in others), key=lambda pair: -pair[0].st_mtime_ns)
            total = 0
            for count, (about, path) in enumerate(abouts, start=1):
                total += about.st_size
                if count >= KEPT_FILES or total > KEPT_BYTES:
                    _delete_unless_locked(path)


def _begun(descriptor: int, name: str, num_bytes: int) -> PackedWeights:
    try:
        return PackedWeights(writer=WeightFileWriter(descriptor, name, num_bytes))
    except (OSError, ValueError) as error:
        _log_own_memory(error)
        return PackedWeights()


def _open_finished(path: Path, name: str) -> dict[str, Packed] | None:
    """The matrices of a finished file, locked against deleting while they last; None without a good one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not _is_at(descriptor, path):
            return None
        found = open_weight_file(descriptor, name)
        with suppress(OSError):
            os.utime(descriptor)  # used now, see `_delete_unused`
    except WeightFileRefused as error:
        _log.warning("a file of packed weights is not used and will be written anew", file=str(path), reason=str(error))
        return None
    else:
        _log.info("weights mapped", file=str(path))
        return found
    finally:
        os.close(descriptor)  # the mapping keeps the lock


def _make_private(directory: Path) -> None:
    """Raises OSError, and WeightFileRefused if others could write to it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = directory.stat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise WeightFileRefused(f"{directory} is not a directory that only this user can write to")


def _delete_unless_locked(path: Path) -> None:
    """Files vanish and appear meanwhile, which is no matter."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            if _try_lock(descriptor) and _is_at(descriptor, path):
                path.unlink()
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _log_own_memory(error: Exception) -> None:
    _log.warning("weights are packed into this worker's own memory, not into a file for all", reason=str(error))
