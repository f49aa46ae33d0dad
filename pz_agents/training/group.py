"""What processes with weights do together: add up gradients, and send out what one of them has.

A process group of torch.distributed that belongs to its object alone: no default group and no
environment variable is set, so that nothing else in the process (TRL, accelerate) takes itself to
be distributed. Gloo joins CPUs and ranks that share a GPU, NCCL ranks with a GPU each. A sum is
the same bytes on every rank.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor

dist: Any = torch.distributed
"""Not all of what is used here has types."""

Backend = Literal["gloo", "nccl"]

_BUCKET = 1 << 24
"""Most numbers of gradient that travel together, unless one parameter has more."""
_PACKET = 1 << 26
"""Most bytes of weights that travel together, unless one tensor has more."""
_MEET_SECONDS = 300.0
_LOOK_SECONDS = 0.0003
_WATCH_SECONDS = 0.05


class Group:
    """A rank's side of the group.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        host: where rank 0 is reached.
        meeting: the port that rank 0 listens on; rank 0 itself gives the socket.
        backend: what carries the tensors.
        seconds: after which an operation that has not ended has failed.
        watch: called now and then while this rank waits, with None, and with the error when an
            operation failed; it may raise a better one.

    Raises:
        RuntimeError: the others did not come, or went.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        meeting: int | socket.socket,
        backend: Backend,
        seconds: float,
        watch: Callable[[RuntimeError | None], None] = lambda _: None,
    ) -> None:
        self._watch, self._backend = watch, backend
        self._device = torch.device("cuda" if backend == "nccl" else "cpu")
        if isinstance(meeting, int):
            listening: dict[str, Any] = {"is_master": False}
            port = meeting
        else:
            # The store takes the descriptor over, and listens where the socket does.
            port = meeting.getsockname()[1]
            listening = {"is_master": True, "master_listen_fd": meeting.detach()}
        self._store: Any = dist.TCPStore(
            host,
            port,
            wait_for_workers=False,
            timeout=timedelta(seconds=_MEET_SECONDS),
            **listening,
        )
        self._group: Any = _opened(
            self._store, rank, size, _own_address(host, port), backend, seconds
        )

    def add_up(self, module: torch.nn.Module, loss: Tensor | float) -> Tensor:
        """Put the sum over the ranks in the place of every gradient; return that of the loss.

        A parameter without a gradient on any rank keeps none.
        """
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        device = trained[0].device
        head = [float(loss), *(float(parameter.grad is not None) for parameter in trained)]
        sums = torch.tensor(head, dtype=torch.float64, device=device)
        self._sum(sums)
        there = [p for p, count in zip(trained, sums[1:].tolist(), strict=True) if count]
        for part in _filled(there, _BUCKET, Tensor.numel):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in part]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            self._sum(flat)
            pieces = torch.split(flat, [grad.numel() for grad in grads])
            for parameter, grad, piece in zip(part, grads, pieces, strict=True):
                parameter.grad = grad.copy_(piece.view_as(grad))
        return sums[0].float()

    @torch.no_grad()
    def same_state(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give every rank what rank 0 trains and what its AdamW knows of it."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        known = [optimizer.state.get(parameter, {}) for parameter in trained]
        counts = [float(each["step"]) if each else -1.0 for each in known]
        steps = torch.tensor(counts, dtype=torch.float64, device=trained[0].device)
        self._send(steps)
        for parameter, count in zip(trained, steps.tolist(), strict=True):
            self._send(parameter.data)
            if count < 0:
                optimizer.state.pop(parameter, None)
                continue
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(count, dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state.setdefault(name, torch.zeros_like(parameter))
                self._send(state[name])

    @torch.no_grad()
    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send rank 0's tensors, to the bit, to the others, who call ``receive`` meanwhile."""
        for part in _filled(tensors, _PACKET, _bytes):
            whole = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in part]
            self._send(torch.cat([piece.to(self._device) for piece in whole]))

    def receive(self, kinds: Sequence[Tensor]) -> list[Tensor]:
        """Return what rank 0 sends, in the host's memory.

        Args:
            kinds: tensors of the same types and shapes, which may hold nothing (``meta``).
        """
        found: list[Tensor] = []
        for part in _filled(kinds, _PACKET, _bytes):
            sizes = [_bytes(kind) for kind in part]
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            self._send(flat)
            for kind, piece in zip(part, torch.split(flat, sizes), strict=True):
                own = torch.empty(kind.shape, dtype=kind.dtype)
                own.reshape(-1).view(torch.uint8).copy_(piece)
                found.append(own)
        return found

    def close(self, *, abort: bool = False) -> None:
        """Leave the group.

        Args:
            abort: others are lost, and an operation may hang on a GPU.
        """
        if abort and self._backend == "nccl":
            self._group.abort()
        self._group = self._store = None

    def _sum(self, tensor: Tensor) -> None:
        self._wait(self._group.allreduce([tensor]))

    def _send(self, tensor: Tensor) -> None:
        """Put rank 0's values into ``tensor``."""
        whole = tensor.contiguous()
        self._wait(self._group.broadcast([whole], dist.BroadcastOptions()))
        if whole is not tensor:
            tensor.copy_(whole)

    def _wait(self, work: Any) -> None:
        looked = time.monotonic()
        while not work.is_completed():
            time.sleep(_LOOK_SECONDS)
            if time.monotonic() - looked > _WATCH_SECONDS:
                self._watch(None)
                looked = time.monotonic()
        try:
            work.wait()
        except RuntimeError as error:
            self._watch(error)
            raise


def checksum(module: torch.nn.Module) -> str:
    """Return a digest of every bit of ``module``'s parameters, worked out where they are."""
    sums = []
    for parameter in module.parameters():
        bits = parameter.detach().contiguous()
        whole = bits.view(torch.int32 if bits.element_size() == 4 else torch.int16)
        sums.append(int(whole.sum(dtype=torch.int64)))
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def device_name(module: torch.nn.Module) -> str:
    """Return ``cpu``, or which GPU of all machines' the module is on."""
    return name_of(next(module.parameters()).device)


def name_of(device: torch.device) -> str:
    """Return ``cpu``, or which GPU of all machines' ``device`` is."""
    if device.type != "cuda":
        return device.type
    return str(torch.cuda.get_device_properties(device).uuid)


def backend_for(devices: Sequence[str]) -> Backend:
    """Return what joins ranks on these devices: NCCL wants a GPU a rank."""
    apart = "cpu" not in devices and len(set(devices)) == len(devices)
    return "nccl" if apart and dist.is_nccl_available() else "gloo"


def _opened(
    store: Any, rank: int, size: int, address: str, backend: Backend, seconds: float
) -> Any:
    limit = timedelta(seconds=seconds)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = limit
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def _own_address(host: str, port: int) -> str:
    """Return this machine's address on the way to ``host``; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host, port))
        return str(way.getsockname()[0])


def _filled(
    tensors: Sequence[Tensor], most: int, size: Callable[[Tensor], int]
) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, so many at once that ``size`` of them is not above ``most``."""
    part: list[Tensor] = []
    for tensor in tensors:
        if part and sum(map(size, part)) + size(tensor) > most:
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
