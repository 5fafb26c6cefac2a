"""Sends requests to workers: in order of urgency, as soon as there is room, with load booked at the pick."""

from __future__ import annotations

import time

from fleet.bus import Bus
from fleet.messages import PrefillRequest
from fleet.types import Passport
from gateway.admission import Admission
from gateway.booking import Bookings
from gateway.directory import Worker
from gateway.holders import HolderIndex
from gateway.live import LiveRequest, Stage
from gateway.router import Route, Router


class Dispatcher:
    """From the waiting room over the router onto the bus.

    A request that found its way counts towards its workers until `leave`.
    """

    def __init__(self, bus: Bus, router: Router, holders: HolderIndex, admission: Admission) -> None:
        self._bus = bus
        self._router = router
        self._holders = holders
        self._bookings = Bookings()
        self._admission = admission
        self._room = admission.room
        self._stopped = False

    def send_off(self, live: LiveRequest) -> None:
        """Dispatch a request, or let it wait for its turn."""
        line = self._room.line(live.passport.model)
        if line.num_ahead(live.passport.priority, live.epoch) or not self._try_dispatch(live):
            line.enter(live)

    def serve_waiting(self) -> None:
        """Dispatch for every model whom there is room for."""
        for model in self._room.models():
            self.serve(model)

    def serve(self, model: str) -> None:
        """Dispatch those who wait for this model, in order, while there is room."""
        line = self._room.line(model)
        while (live := line.first) is not None and self._try_dispatch(live):
            line.leave(live, served=True)

    def _try_dispatch(self, live: LiveRequest) -> bool:
        """Dispatch a request, if there is room for it."""
        if self._stopped:
            return False
        passport = live.next_passport()
        route = self._router.pick(passport, affinity=live.affinity)
        self._room.mark(passport.model, served=route is not None or self._router.has_route(passport))
        if route is not None:
            self._dispatch(live, passport, route)
        return route is not None

    def _dispatch(self, live: LiveRequest, passport: Passport, route: Route) -> None:
        live.stage = Stage.PREFILLING
        live.prefill_peer = route.prefill.peer
        live.hops.send(route.prefill.peer.name, epoch=passport.epoch, reason=live.replayed_for or "admitted")
        live.holders = [route.prefill.peer]
        self._holders.follow(live)
        live.touched_s = time.monotonic()
        live.missing_beats = 0
        self._bookings.book(live.request_id, route.prefill, route.fresh_tokens)
        for worker in route.targets[:1]:
            self._bookings.book(live.request_id, worker, len(passport.token_ids))
        request = PrefillRequest(passport=passport, targets=[worker.peer for worker in route.targets])
        self._bus.send(route.prefill.peer.address, request)
        self._admission.sent_off(live)

    def rebook(self, live: LiveRequest, worker: Worker | None) -> None:
        """Count the request towards this worker alone."""
        self._bookings.release(live.request_id)
        if worker is not None:
            self._bookings.book(live.request_id, worker, live.prompt_len + len(live.output))

    def forget(self, worker: Worker) -> None:
        """A worker is gone."""
        self._bookings.forget(worker)

    def leave(self, live: LiveRequest) -> None:
        """The request is over, or begins anew. Idempotent."""
        self._admission.sent_back(live)
        self._bookings.release(live.request_id)

    def overdue(self) -> list[LiveRequest]:
        """Those for whom no worker has come in time."""
        return [live for model in self._room.models() for live in self._room.overdue(model)]

    def stop(self) -> None:
        """Dispatch nothing any more."""
        self._stopped = True
