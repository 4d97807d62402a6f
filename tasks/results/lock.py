"""Locks of cache keys by lock files, under Prefect's `LockManager` protocol.

The system frees a lock file when its holder dies. Prefect's own `FileSystemLockManager`, and
prefect-redis' locks, would be left for ever: Prefect sets no time after which they end. So machines
that share a store by a URL do not wait for each other; a piece that two make at once is the same.
"""

import asyncio

from filelock import FileLock, Timeout
from prefect.locking.protocol import LockManager

from tasks.results.store import LOCKS, file_lock, store

# The locks that this process holds: key -> holder and lock. A table of the module, so that the
# manager itself can be sent to other processes.
_HELD: dict[str, tuple[str, FileLock]] = {}


class FileLocks(LockManager):
    """One lock file per key, in the store's folder on this machine. Times are in seconds."""

    def acquire_lock(
        self, key: str, holder: str,
        acquire_timeout: float | None = None, hold_timeout: float | None = None,
    ) -> bool:  # fmt: skip
        if self.is_lock_holder(key, holder):
            return True
        lock = _lock(key, acquire_timeout)
        try:
            lock.acquire()
        except Timeout:
            return False
        _HELD[key] = (holder, lock)
        return True

    async def aacquire_lock(
        self, key: str, holder: str,
        acquire_timeout: float | None = None, hold_timeout: float | None = None,
    ) -> bool:  # fmt: skip
        return await asyncio.to_thread(self.acquire_lock, key, holder, acquire_timeout)

    def release_lock(self, key: str, holder: str) -> None:
        if not self.is_lock_holder(key, holder):
            raise ValueError(f"{holder} does not hold the lock of {key}")
        _HELD.pop(key)[1].release()

    def is_locked(self, key: str) -> bool:
        return not self.wait_for_lock(key, 0)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        return key in _HELD and _HELD[key][0] == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        try:
            with _lock(key, timeout):
                return True
        except Timeout:
            return False

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        return await asyncio.to_thread(self.wait_for_lock, key, timeout)


def _lock(key: str, timeout: float | None) -> FileLock:
    return file_lock(store().root / LOCKS / f"{key}.lock", -1 if timeout is None else timeout)
