"""What tests of shared engines put into other processes."""

import os
import threading
import time

from pz_agents.training.worker import Engine


class Meeting:
    """Calls that meet, wait, or count how many are served side by side."""

    def __init__(self, number, count=1):
        """Take how many calls a meeting needs."""
        self._barrier = threading.Barrier(count)
        self._lock, self._now, self._most = threading.Lock(), 0, 0

    def meet(self):
        """Return when enough calls are here."""
        self._barrier.wait(120)
        return True

    def most(self, seconds):
        """Stay for so long; return the most calls that were here at once."""
        with self._lock:
            self._now += 1
            self._most = max(self._most, self._now)
        time.sleep(seconds)
        with self._lock:
            self._now -= 1
        return self._most


class Idle:
    """A worker that is never asked to play."""

    def __init__(self, settings, engines, number):
        """Take what a worker gets."""


class Told(Engine):
    """Tells what it holds and how it came; breaks where version 4 or 5 is to arrive."""

    received = loaded = 0

    def load(self, weights, version):
        """Count."""
        self.loaded += 1
        return super().load(weights, version)

    def receive(self, kinds, version):
        """Count; engine 1 leaves the group before version 4, and dies of version 5."""
        if self.number == 1 and version == 4:
            self._group = None
        if self.number == 1 and version == 5:
            os.kill(os.getpid(), 9)
        self.received += 1
        return super().receive(kinds, version)

    def __init__(self, model, threads, number):
        """Remember which it is."""
        super().__init__(model, threads, number)
        self.number = number

    def told(self):
        """Return the version, a digest of all weights, and how often they came each way."""
        from pz_agents.training.group import checksum

        return [self._version, checksum(self._model.network), self.received, self.loaded]


class Member:
    """A process with a GPU of its own in a group."""

    def __init__(self, number):
        """Take the second GPU."""
        os.environ["CUDA_VISIBLE_DEVICES"] = "1"

    def receive(self, host, port, backend, sizes):
        """Join as rank 1; return the sums of the tensors that come."""
        import torch

        from pz_agents.training.group import Group

        group = Group(1, 2, host, port, backend, 120.0)
        found = group.receive([torch.empty(size, device="meta") for size in sizes])
        return [float(each.sum()) for each in found]
