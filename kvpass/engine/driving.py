"""Who computes the steps: whoever waits for a token, a thread that serves, or a worker thread of an asyncio loop."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread

from kvpass.engine.request import News, Request, wake_in
from kvpass.engine.step_loop import StepLoop
from kvpass.errors import InputError


class Driver:
    """Brings a :class:`StepLoop` forward for those who wait.

    A thread that waits computes steps itself, unless a thread serves. A task of an asyncio loop never computes: where
    no thread serves, a worker thread of its loop does, for as long as tasks wait.
    """

    def __init__(self, loop: StepLoop) -> None:
        self._loop = loop
        loop.on_submit = self._notice
        self._serving_lock = Lock()
        self._servers = 0
        self._thread: Thread | None = None
        self._served = False
        self._process = os.getpid()
        # What the serving thread sleeps on. Its put may be called by the garbage collector at any point.
        self._bell: SimpleQueue[None] = SimpleQueue()
        # Held by the worker thread that computes for the tasks of asyncio loops, and which futures these wait for.
        self._baton = Lock()
        self._tasks: set[asyncio.Future[None]] = set()

    def wait(self, news: News, ready: Callable[[], bool], timeout: float | None = None) -> None:
        """Return once ``ready()`` is true; what makes it true comes with ``news``.

        Raises:
            TimeoutError: if it is not after ``timeout`` seconds; looked at between steps.
            InputError: if nobody could ever bring it: in a step of the thread that serves, or in a forked process.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"the tokens waited for have not come within {timeout} seconds")
            if self._served:
                self._check_can_wait()
                self._park(news, ready, left)
            else:
                with self._loop.computing():
                    # Another thread's step may have brought something while this one waited for the lock.
                    if not ready():
                        self._loop.step()

    def stream(self, requests: list[Request]) -> Generator[tuple[int, int], None, None]:
        """Submit the requests of one call, and yield ``(index, token)`` for each token as it comes."""
        news = requests[0].news
        arrived = news.arrived
        assert arrived is not None
        try:
            self._loop.submit(requests)
            while True:
                self.wait(news, lambda: bool(arrived) or news.failure is not None or news.pending == 0)
                while arrived:
                    yield arrived.popleft()
                if news.failure is not None:
                    raise news.failure
                if news.pending == 0 and not arrived:
                    return
        finally:
            self._loop.cancel(requests)

    def complete(self, request: Request) -> None:
        """Submit a request and wait for its end; an exception cancels it.

        Raises:
            KvpassError: if the request failed.
        """
        try:
            self._loop.submit([request])
            self.wait(request.news, lambda: request.ended)
        finally:
            self._loop.cancel([request])
        if request.failure is not None:
            raise request.failure

    async def wait_async(self, news: News, ready: Callable[[], bool]) -> None:
        """As :meth:`wait`, in a task of an asyncio loop."""
        running = asyncio.get_running_loop()
        while not ready():
            future = running.create_future()
            self._tasks.add(future)
            news.wakers.append(partial(wake_in, running, future))
            try:
                if not ready():
                    if not self._served and not self._baton.locked():
                        running.run_in_executor(None, self._drive_for_tasks)
                    await future
            finally:
                self._tasks.discard(future)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Have a thread compute as long as there is something to compute, until the block is left."""
        with self._serving_lock:
            self._servers += 1
            if self._thread is None:
                self._served = True
                self._thread = Thread(target=self._serve, name="kvpass-serving", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._serving_lock:
                self._servers -= 1
                if self._servers == 0:
                    self._stop()

    def stop(self) -> None:
        """End the thread that serves, if there is one."""
        with self._serving_lock:
            self._stop()

    def _stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._served = False
        self._bell.put(None)
        thread.join()
        # Those who waited for the thread go on by themselves.
        with self._loop.exclusive():
            for request in self._loop.requests.values():
                request.news.wake()

    def _notice(self) -> None:
        if self._served:
            self._bell.put(None)

    def _check_can_wait(self) -> None:
        self._loop.check_outside()
        if os.getpid() != self._process:
            raise InputError(
                "this process was forked from one in which a thread serves the engine, and has no such thread: compile "
                "the model here, or fork before engine.serving()"
            )

    def _serve(self) -> None:
        try:
            while self._served:
                if self._loop.has_work:
                    self._compute()
                else:
                    self._bell.get()
                    while not self._bell.empty():
                        self._bell.get()
        except BaseException as error:  # outside of a step, whose errors end its own requests alone
            self._served = False
            self._loop.fail_all(error)

    def _compute(self) -> None:
        with self._loop.computing():
            if self._loop.requests:
                self._loop.step_for_nobody()

    def _park(self, news: News, ready: Callable[[], bool], timeout: float | None) -> None:
        """Sleep until news has come, or the thread that serves has stopped."""
        lock = Lock()
        lock.acquire()
        news.wakers.append(lock.release)
        if not ready() and self._served:
            lock.acquire(timeout=-1 if timeout is None else timeout)

    def _drive_for_tasks(self) -> None:
        """Compute while tasks wait; at once over if another worker does."""
        while self._tasks and self._loop.has_work and not self._served and self._baton.acquire(blocking=False):
            try:
                while self._tasks and self._loop.has_work and not self._served:
                    self._compute()
            except BaseException as error:
                self._loop.fail_all(error)
            finally:
                self._baton.release()
