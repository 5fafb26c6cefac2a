"""Several processes' hand-off desks on a simulated network, clock and memory: the owner of every action is here.

A page is eight bytes. Direct writes happen in two steps per page, the look at the generation word and the write, so
that anything may come in between; frames are copied on sending, as the bus does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from fleet.hand_off_messages import HandOffMessage
from kvtransfer.actions import Action, Given, HandOffFailed, ReleasePages, Send, Store, Write
from kvtransfer.errors import GrantRevoked
from kvtransfer.host import ProcessIdentity
from support.hand_off_process import GARBAGE, LIMITS, PAGE_SIZE, Process, page_content, page_name, sim_passport

N = TypeVar("N")


@dataclass
class Job:
    """A write or store on a transfer thread: how far it is, and the owners it saw when it looked."""

    process: Process
    work: Write | Store
    position: int = 0
    seen: str | None = None


@dataclass
class InFlight:
    """A message on the network; its frames are what the sender's pages held."""

    to: str
    message: HandOffMessage
    frames: list[bytes]


class World:
    """Processes, network, transfer threads and clock. Implements `ProcessWatch` as /proc would."""

    def __init__(self, *, transport: str, givers: int = 1, takers: int = 1, num_pages: int = 8) -> None:
        self.now_s = 100.0
        self.network: list[InFlight] = []
        self.jobs: list[Job] = []
        self.processes: dict[str, Process] = {}
        self.lives: list[Process] = []
        self.started: dict[tuple[str, int], Process] = {}
        self.transport = transport
        self.num_pages = num_pages
        self._pids = count(1)
        for name in [f"giver-{i}" for i in range(givers)] + [f"taker-{i}" for i in range(takers)]:
            self.boot(name)

    def boot(self, name: str) -> Process:
        """Start a process, or start it again at the same address."""
        process = Process(self, name, next(self._pids), transport=self.transport, num_pages=self.num_pages)
        self.processes[name] = process
        self.lives.append(process)
        return process

    def is_gone(self, process: ProcessIdentity) -> bool:
        return not any(life.alive for life in self.lives if life.pid == process.pid)

    def kill(self, process: Process) -> None:
        """End it: its threads and what it had not yet sent go with it."""
        process.alive = False
        self.jobs = [job for job in self.jobs if job.process is not process]

    # the service of each process

    def start(self, giver: Process, request_id: str, epoch: int, num_tokens: int, targets: Sequence[Process]) -> None:
        num_pages = -(-num_tokens // PAGE_SIZE)
        key = (request_id, epoch)
        giver.own_pages[key] = self.own(giver, num_pages)
        self.started[key] = giver
        names = [page_name(request_id, index) for index in range(num_tokens // PAGE_SIZE)]
        self._do(
            giver,
            giver.desk.giver.start(
                sim_passport(request_id, epoch, num_tokens),
                page_hashes=names,
                num_pages=num_pages,
                targets=[target.peer for target in targets],
                now_s=self.now_s,
            ),
        )

    def own(self, giver: Process, num_pages: int) -> list[int]:
        """Pages of the giving side; a memory of their own, behind the pool of the taking side."""
        giver.memory.extend([GARBAGE] * num_pages)
        return list(range(len(giver.memory) - num_pages, len(giver.memory)))

    def ready(self, request_id: str, epoch: int, num_full_pages: int) -> None:
        giver = self.started[request_id, epoch]
        pages = giver.own_pages.get((request_id, epoch), [])[:num_full_pages]
        self._fill(giver, request_id, pages)
        self._do(giver, giver.desk.giver.pages_ready(request_id, epoch, pages, self.now_s))

    def commit(self, request_id: str, epoch: int, num_tokens: int) -> None:
        giver = self.started[request_id, epoch]
        pages = giver.own_pages.get((request_id, epoch))
        if pages is None:
            return
        self._fill(giver, request_id, pages)
        passport = sim_passport(request_id, epoch, num_tokens + 1)
        self._do(
            giver,
            giver.desk.giver.commit(passport, page_ids=pages, num_computed_tokens=num_tokens, now_s=self.now_s),
        )

    def _fill(self, giver: Process, request_id: str, pages: Sequence[int]) -> None:
        for index, page in enumerate(pages):
            giver.memory[page] = page_content(request_id, index)

    def cancel(self, process: Process, request_id: str, epoch: int) -> None:
        self._do(process, process.desk.cancel(request_id, epoch, self.now_s))

    def hand_off(self, request_id: str, num_tokens: int, *, epoch: int = 0) -> None:
        """One whole hand-off from the first giver to all takers in order, as far as the service's calls go."""
        targets = [p for name, p in self.processes.items() if name.startswith("taker")]
        self.start(self.processes["giver-0"], request_id, epoch, num_tokens, targets)
        self.ready(request_id, epoch, num_tokens // PAGE_SIZE)
        self.commit(request_id, epoch, num_tokens)

    # what moves

    def deliver(self, index: int = 0, *, keep: bool = False) -> None:
        """Deliver a message; `keep` delivers a duplicate. Nobody or a stopped process at the address: it waits."""
        flight = self.network[index]
        process = self._at(flight.to)
        if process is not None and process.stopped:
            return
        if not keep:
            del self.network[index]
        if process is None:
            return
        frames = [memoryview(frame) for frame in flight.frames]
        self._do(process, process.desk.on_message(flight.message, frames, self.now_s))

    def _at(self, address: str) -> Process | None:
        for process in self.processes.values():
            if process.alive and process.peer.address == address:
                return process
        return None

    def step_job(self, index: int = 0) -> None:
        """One step of a copy."""
        job = self.jobs[index]
        if job.process.stopped:
            return
        if isinstance(job.work, Store):
            self._step_store(job, job.work)
        else:
            self._step_write(job, job.work)

    def _step_store(self, job: Job, store: Store) -> None:
        bank, page = job.process.bank, store.page_ids[job.position]
        owner = bank.owners.get(page, "")
        assert job.seen in {None, owner.rpartition(":")[2]}, f"page {page} of {job.seen} is {owner} now"
        assert owner.startswith(("reserved", "quarantined")), f"page {page} is stored to, but it is {owner or 'free'}"
        job.seen = owner.rpartition(":")[2]
        job.process.memory[page] = bytes(store.frames[job.position])
        job.position += 1
        if job.position == len(store.page_ids):
            self.jobs.remove(job)
            self._do(job.process, job.process.desk.taker.on_stored(store.ticket, self.now_s))

    def _step_write(self, job: Job, write: Write) -> None:
        taker = next(life for life in self.lives if life.peer == write.grant.taker)
        page = write.grant.page_ids[write.first + job.position]
        owner = taker.bank.owners.get(page, "")
        if job.seen is None:
            if taker.gate.words.get(page) != write.grant.generation:
                self.jobs.remove(job)
                self._written(job, write, GrantRevoked("revoked"))
                return
            job.seen = owner.rpartition(":")[2]
            return
        if taker.alive:
            assert owner in {f"reserved:{job.seen}", f"quarantined:{job.seen}"}, f"write to page {page}, now {owner}"
        taker.memory[page] = job.process.memory[write.page_ids[job.position]]
        job.seen = None
        job.position += 1
        if job.position == len(write.page_ids):
            self.jobs.remove(job)
            self._written(job, write, None)

    def _written(self, job: Job, write: Write, error: GrantRevoked | None) -> None:
        self._do(job.process, job.process.desk.giver.on_written(write.ticket, error, self.now_s))

    def advance(self, seconds: float) -> None:
        """Time passes, and every running process ticks."""
        self.now_s += seconds
        for process in list(self.processes.values()):
            if process.alive and not process.stopped:
                self._do(process, process.desk.tick(self.now_s))

    def _do(self, process: Process, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                frames = [process.memory[page] for page in action.page_ids]
                self.network.append(InFlight(action.to.address, action.message, frames))
            elif isinstance(action, Write | Store):
                self.jobs.append(Job(process, action))
            else:
                process.news.append(action)
                if isinstance(action, ReleasePages):
                    for page in process.own_pages.pop((action.request_id, action.epoch)):
                        process.memory[page] = GARBAGE

    # running on

    def step(self) -> bool:
        """The oldest thing that can move moves; False if nothing can."""
        for index, flight in enumerate(self.network):
            process = self._at(flight.to)
            if process is None or not process.stopped:
                self.deliver(index)
                return True
        for index, job in enumerate(self.jobs):
            if not job.process.stopped:
                self.step_job(index)
                return True
        return False

    def run(self, *, for_s: float = 0.0) -> None:
        """Everything moves, then time passes beat by beat."""
        end_s = self.now_s + for_s
        while True:
            while self.step():
                pass
            if self.now_s >= end_s:
                return
            self.advance(LIMITS.beat_s)

    # what must hold

    def news_of(self, process: Process, kind: type[N]) -> list[N]:
        return [news for news in process.news if isinstance(news, kind)]

    def check_settled(self) -> None:
        """No live process keeps a hand-off or a page in transit; every start of one ended exactly once."""
        for process in self.processes.values():
            if not process.alive:
                continue
            name = process.peer.name
            assert process.desk.giver.num_open == 0, name
            assert process.desk.taker.num_open == 0, name
            assert process.desk.taker.num_quarantined == 0, name
            assert process.bank.in_transit() == {}, name
            assert not any(process.gate.words.values()), name
            starts = sum(giver is process for giver in self.started.values())
            assert len(self.news_of(process, Given)) + len(self.news_of(process, HandOffFailed)) == starts, name
            assert len(self.news_of(process, ReleasePages)) == starts, name
            assert process.own_pages == {}, name

    def adoptions(self, key: tuple[str, int]) -> int:
        return sum(life.bank.adopted.get(key, 0) for life in self.lives)
