"""What tests of runtimes and fleets put into other processes: workers and engines that break.

And a Ray of a certain size, and by how much the weights of two runs differ.

Faults happen once: whoever makes the mark first has the fault.
"""

import contextlib
import os
import time

import pz_envs.catalog
from pz_agents.errors import ModelError
from pz_agents.runtime import connect
from pz_agents.training.worker import Engine, RolloutWorker
from pz_envs.textenv import Outcome, TextEnv

ENGINE_MARK = "engine-mark"
"""A file in the folder of the engine's model."""


def weights_apart(left, right):
    """Return the largest difference between the policies in the folders of two runs."""
    from safetensors.torch import load_file

    one, two = (load_file(folder / "policy" / "model.safetensors") for folder in (left, right))
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@contextlib.contextmanager
def two_gpus(cpus):
    """Start a Ray that counts two GPUs, whatever this machine has."""
    import pytest  # not in the processes that import this file

    ray = pytest.importorskip("ray", reason="needs pz-agents[ray]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        ray.init(
            num_cpus=cpus,
            num_gpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 << 20,
            _node_ip_address="127.0.0.1",
        )
        yield
        ray.shutdown()


def first_to_ask(mark):
    """Return whether nobody made this mark before."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class ParityEnv(TextEnv):
    """Two turns; pays 1 for a reply of an even number of characters, other than none."""

    family = "toy"

    def __init__(self, fault="", mark="", **kwargs):
        """Take a fault: ``die`` at the mark, ``third`` of the tasks, or ``always``."""
        super().__init__()
        self._fault, self._mark = fault, mark

    def _start(self, seed, options):
        self._seed, self._turns, self._total, self._max_score = seed, 0, 0.0, 2.0
        self._task_id = f"parity-{seed % 3}"
        return Outcome(f"Go {seed % 7}.", 0.0)

    def _advance(self, command):
        self._turns += 1
        if "die" in self._fault and self._turns == 2 and first_to_ask(self._mark):
            os.kill(os.getpid(), 9)
        if self._fault == "always" or ("third" in self._fault and self._seed % 3 == 0):
            raise RuntimeError("the engine broke")
        reward = float(len(command) % 2 == 0)
        self._total += reward
        over = self._turns == 2
        return Outcome("Again.", self._total, reward, terminated=over, success=self._total == 2)


def make_env(env_id, **kwargs):
    """Return the toy in the place of any environment."""
    return ParityEnv(**kwargs)


class Worker(RolloutWorker):
    """Plays the toy."""

    def __init__(self, **kwargs):
        """Put the toy in the place of every environment."""
        pz_envs.catalog.make_env = make_env
        super().__init__(**kwargs)


class ClientWorker(Worker):
    """Asks a model that somebody serves; its weights are not a run's business."""

    def play(self, number, places, version, weights):
        """Play with the weights that the model has."""
        self._policy.version = version
        return super().play(number, places, version, None)


class MarkedEngine(Engine):
    """Breaks once, at the mark in its model's folder."""

    asked = loaded = 0

    def __init__(self, model, threads, number):
        """Remember where the mark goes."""
        super().__init__(model, threads, number)
        self.mark = os.path.join(model, ENGINE_MARK)


class DyingEngine(MarkedEngine):
    """Dies by SIGKILL in the middle of its third request, once."""

    def generate(self, requests, wanted):
        """Sample, and die before the answer is sent."""
        self.asked += 1
        done = super().generate(requests, wanted)
        if self.asked == 3 and first_to_ask(self.mark):
            os.kill(os.getpid(), 9)
        return done


class HangingEngine(MarkedEngine):
    """Hangs in the middle of its third request, once."""

    def generate(self, requests, wanted):
        """Sample, and never send the answer."""
        self.asked += 1
        done = super().generate(requests, wanted)
        if self.asked == 3 and first_to_ask(self.mark):
            time.sleep(3600)
        return done


class HalfLoadedEngine(MarkedEngine):
    """Dies by SIGKILL when the first half of its second weights is in place, once."""

    def load(self, weights, version):
        """Load, but for the last half."""
        self.loaded += 1
        if self.loaded == 2 and first_to_ask(self.mark):
            state = self._model.network.state_dict()
            for tensor in list(state.values())[: len(state) // 2]:
                tensor.fill_(0.5)
            os.kill(os.getpid(), 9)
        return super().load(weights, version)


class HangingWorker:
    """Plays nothing; hangs the first time that it is asked."""

    def __init__(self, settings, engines, number):
        """Find the mark among the settings."""
        self.mark = settings["env_kwargs"]["mark"]

    def play(self, number, places, version, weights):
        """Return no episodes, or never."""
        if first_to_ask(self.mark):
            time.sleep(3600)
        return []


class Thing:
    """A small object to call."""

    def __init__(self, number, base=0):
        """Take a number and where the sum begins."""
        if base < 0:
            raise ModelError(f"base is {base}")
        self.number, self.total = number, base

    def add(self, amount):
        """Return the number and the sum so far."""
        self.total += amount
        return [self.number, self.total]

    def size(self, data):
        """Return how many bytes came."""
        return len(data)

    def back(self, value):
        """Return what came."""
        return value

    def sleep(self, seconds):
        """Take so long."""
        time.sleep(seconds)
        return seconds

    def raise_model_error(self):
        """Raise an error of pz."""
        raise ModelError("no such model")

    def raise_key_error(self):
        """Raise an error that is not of pz."""
        raise KeyError("x")

    def ask(self, address):
        """Return the answer of another thing."""
        return connect(address).call("add", 10)
