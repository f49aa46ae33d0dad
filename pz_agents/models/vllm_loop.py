"""One thread that an engine lives in, with an event loop that every caller's work is a task of.

Work comes from any thread (``wait``) or any other event loop (``join``), and its requests are added
to the engine as they come, between two of its steps: that is vLLM's continuous batching. Who waits
costs nothing. Weights are changed when nobody is using them, and those who come later wait for the
change, so that no answer is of two versions. Nothing here imports vllm, and nothing needs a lock:
all of it runs in the one thread, which is also the only one the engine ever sees.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pz_agents.errors import ModelError

T = TypeVar("T")

_END_SECONDS = 60.0


class EngineLoop:
    """An engine and its thread, which ends with this object or with the process.

    Args:
        name: of the model, for messages.
        build: returns a ``vllm.LLM`` whose engine runs in this process; called in the thread.

    Attributes:
        llm: what ``build`` returned.
        unusable: why nothing can be answered now; empty while all is well.

    What ``build`` raises is raised here.
    """

    def __init__(self, name: str, build: Callable[[], Any]) -> None:
        self._name = name
        self.unusable = ""
        self._names = itertools.count()
        self._pending: dict[str, asyncio.Future[Any]] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._users = 0
        self._changes = 0
        self._idle, self._open = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=(self._loop,), daemon=True, name="pz-vllm")
        thread.start()
        ending = weakref.finalize(self, _end, self._loop, thread)
        self.llm = self.wait(_called(build))
        # The last that is registered runs first: at exit the thread ends before the engine does.
        ending.detach()
        weakref.finalize(self, _end, self._loop, thread)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` in the engine's thread and wait for it; whoever is interrupted ends it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    async def join(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` in the engine's thread, awaited in another loop; cancelling it ends it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def answer(self, asked: Sequence[tuple[list[int], Any]], lora: Any) -> list[Any]:
        """Run requests beside everybody's; returns vLLM's outputs in order.

        Args:
            asked: prompt ids and sampling parameters.
            lora: the adapter to answer with, or None.

        Raises:
            ModelError: vLLM refuses one of them, and ends the others; or the engine failed.
        """
        self._check()
        engine = self.llm.llm_engine
        futures: dict[str, asyncio.Future[Any]] = {}
        try:
            for ids, params in asked:
                name = str(next(self._names))
                engine.add_request(name, {"prompt_token_ids": ids}, params, lora_request=lora)
                futures[name] = self._pending[name] = self._loop.create_future()
            if self._stepping is None and futures:
                self._stepping = self._loop.create_task(self._step())
            return await asyncio.gather(*futures.values())
        except ValueError as error:
            raise ModelError(f"{self._name} refused a request: {error}") from error
        finally:
            left = [name for name in futures if self._pending.pop(name, None) is not None]
            if left:
                engine.abort_request(left)

    @asynccontextmanager
    async def using(self) -> AsyncIterator[None]:
        """Hold the weights as they are; those who wait to change them go first."""
        while self._changes:
            await self._open.wait()
        self._check()
        self._users += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    async def changed(self, change: Callable[[], T]) -> T:
        """Call ``change`` when nobody uses the weights, keeping everybody out until it is done."""
        self._changes += 1
        self._open.clear()
        try:
            while self._users:
                await self._idle.wait()
            return change()
        finally:
            self._changes -= 1
            if not self._changes:
                self._open.set()

    async def _step(self) -> None:
        """Step the engine until nobody waits for an answer."""
        try:
            while self._pending:
                for output in self.llm.llm_engine.step():
                    future = self._pending.pop(output.request_id, None) if output.finished else None
                    if future is not None and not future.done():
                        future.set_result(output)
                await asyncio.sleep(0)  # those who came meanwhile add their requests here
        except Exception as error:
            # The engine is in an unknown state; everybody who waits must hear of it.
            self.unusable = f"its engine failed ({type(error).__name__}: {error}). Load it anew"
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(ModelError(f"{self._name} cannot answer: {self.unusable}"))
        finally:
            self._stepping = None

    def _check(self) -> None:
        if self.unusable:
            raise ModelError(f"{self._name} cannot answer: {self.unusable}")


async def _called(build: Callable[[], T]) -> T:
    return build()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Stop the loop after its present step; the thread itself may be who forgets it."""
    if not thread.is_alive():
        return
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():
        thread.join(_END_SECONDS)
