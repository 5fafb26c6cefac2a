"""Who has been given how much: load is booked on a worker at the pick, taken back when the request moves on."""

from __future__ import annotations

from gateway.directory import Worker


class Bookings:
    """Tokens and requests booked on workers, by request."""

    def __init__(self) -> None:
        self._booked: dict[str, list[tuple[Worker, int]]] = {}

    def book(self, request_id: str, worker: Worker, num_tokens: int) -> None:
        """Count a request of so many tokens towards a worker. Mutates: the worker's booked figures."""
        worker.booked_tokens += num_tokens
        worker.booked_requests += 1
        worker.free_tokens -= num_tokens
        self._booked.setdefault(request_id, []).append((worker, num_tokens))

    def release(self, request_id: str) -> None:
        """Take back all that is booked for a request. Idempotent."""
        for worker, num_tokens in self._booked.pop(request_id, ()):
            worker.booked_tokens -= num_tokens
            worker.booked_requests -= 1
            worker.free_tokens += num_tokens

    def forget(self, worker: Worker) -> None:
        """A worker is gone; what was booked on it counts nowhere."""
        for request_id, bookings in list(self._booked.items()):
            kept = [booking for booking in bookings if booking[0] is not worker]
            if kept:
                self._booked[request_id] = kept
            else:
                del self._booked[request_id]
