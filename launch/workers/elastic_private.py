"""Subclasses of the private parts of torch.distributed.elastic: its rendezvous, the rendezvous state, and its agent.

Written for and tested with torch 2.11 to 2.13. Other modules use only the public names of these classes.
"""

import contextlib
import signal
import sys
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, MultiprocessContext
from torch.distributed.elastic.rendezvous import RendezvousError, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, Token, _NodeDesc

from bagualu.comm.store import Store, TCPStore
from bagualu.launch.workers.secret import Seal


def name_of_caller(depth: int = 2) -> str:
    """Returns the name of the function `depth` calls up, like elastic's `get_method_name`.

    Elastic names each of its events so, a dozen in every rendezvous and more while a run goes on, although it hands them to nobody.
    Its own function looks up the source of every frame on the stack, twice: a second of processor time at each start of a run.
    """
    return sys._getframe(depth).f_code.co_name


dynamic_rendezvous.get_method_name = name_of_caller


class NodeRendezvous(DynamicRendezvousHandler):
    """Elastic's rendezvous. It also reports missing nodes of the last round and shares its store with the workers."""

    _met: frozenset[_NodeDesc] = frozenset()
    seal: Seal
    """Signs and verifies the values in the store."""
    round: int = 0
    """Number of the last completed rendezvous round."""

    def share(self, store: TCPStore, address: str, port: int, seal: Seal) -> None:
        """Let the workers use the agents' store at `address` instead of a second one that elastic would open on all interfaces."""
        self._shared_tcp_store_server, self._bootstrap_store_info = store, RendezvousStoreInfo(address, port)
        self.seal = seal

    def _get_store(self) -> Store:
        self.round = self._state_holder.state.round
        store: Store = super()._get_store()
        return store

    def _get_world(self) -> tuple[int, int]:
        self._met = frozenset(self._state_holder.state.participants)  # before elastic removes a silent node
        return super()._get_world()

    def missing(self) -> list[str]:
        """Returns the addresses of other nodes of the last round whose agents are silent, or have left and not returned."""
        heard = self._state_holder.state.last_heartbeats.keys()  # refreshed every second, when this node sends its own heartbeat
        return sorted(node.addr for node in self._met - heard - {self._this_node})

    def present(self) -> int:
        """Returns how many agents, one on each node, take part in the rendezvous or wait to join, including this agent."""
        state = self._state_holder.state
        return len({*state.participants, *state.wait_list, self._this_node})

    def _keep_alive(self) -> None:
        """Send a heartbeat, also after elastic has removed this node for missed heartbeats.

        Elastic alone would never send another heartbeat for a removed node, so a short interruption would lose the node for good.
        """
        super()._keep_alive()
        with self._heartbeat_lock:
            holder = self._state_holder
            if self._this_node in self._met and self._this_node not in holder.state.last_heartbeats:
                holder.state.last_heartbeats[self._this_node] = datetime.now(UTC)
                holder.mark_dirty()
                with contextlib.suppress(RendezvousError):
                    holder.sync()


class SignedBackend(C10dRendezvousBackend):
    """Keeps elastic's rendezvous state in a store, and ignores states that no agent of the run has signed.

    Elastic unpickles the state, so a forged state could run any code with the user's rights.
    """

    def __init__(self, store: Store, run_id: str, seal: Seal) -> None:
        self._seal = seal
        self._newest: bytes | None = None
        """The newest state with a valid signature that this agent has read or written; None before the first."""
        super().__init__(store, run_id)

    def get_state(self) -> tuple[bytes, Token] | None:
        return self._opened(self._call_store("get", self._key))

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """Replace the state that was read with `token`; without a token, only a missing or unsigned state is replaced.

        Returns the state that is stored afterwards, its token, and whether it is `state`; None if no state is stored.
        """
        if token is None:
            token = self._call_store("get", self._key)
            if (stored := self._opened(token)) is not None:
                return *stored, False
        signed = self._seal.sign(self._key, b64encode(state).decode())
        current: bytes = self._call_store("compare_set", self._key, token, signed)
        opened = self._opened(current)
        return None if opened is None else (*opened, current == signed.encode())

    def _opened(self, value: bytes) -> tuple[bytes, Token] | None:
        """Returns (state, token) of a stored value; the token is `value` itself. None if no state was stored yet.

        If `value` is not signed by an agent of the run, the newest signed state is returned instead, and elastic replaces the
        value.
        """
        if value == self._NULL_SENTINEL.encode():
            return None
        if (text := self._seal.opened(self._key, value)) is not None:
            self._newest = b64decode(text)
        return None if self._newest is None else (self._newest, value)


class NoLogs(LogsSpecs):
    """Turns off elastic's log files: workers redirect their output (log_file.py) and write their failures (worker_failures.py)."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nothing = dict.fromkeys(envs, "")
        return LogsDest(dict(nothing), dict(nothing), {}, {}, dict(nothing))

    @property
    def root_log_dir(self) -> str:
        return ""


class ElasticAgent(LocalElasticAgent):
    """Elastic's agent of one machine, with public names for the steps of a generation, which a subclass overrides:

    meet -> start -> look, repeatedly -> restart, or the end of the run
    """

    def __init__(self, spec: WorkerSpec, exit_seconds: float) -> None:
        """`exit_seconds` is how long this agent waits for the agents of other nodes at the end of a run."""
        super().__init__(spec, NoLogs(), start_method="forkserver", exit_barrier_timeout=exit_seconds)

    @property
    def group(self) -> WorkerGroup:
        """The workers of this machine in the present generation, and their ranks."""
        group: WorkerGroup = self._worker_group
        return group

    def meet(self) -> None:
        """Meet the agents of the other nodes, and give the workers their ranks. Raises RendezvousError, DistStoreError."""
        super()._rendezvous(self.group)

    def start(self) -> dict[int, int]:
        """Start the workers. Returns their process ids by local rank."""
        pids: dict[int, int] = super()._start_workers(self.group)
        return pids

    def look(self) -> RunResult:
        """Returns elastic's result: whether the workers are still running, have failed, or have all returned, and their return
        values."""
        result: RunResult = super()._monitor_workers(self.group)
        return result

    def restart(self) -> None:
        """Stop the workers, and begin the next generation."""
        super()._restart_workers(self.group)

    def allow_restart(self, allowed: bool) -> None:
        """Set whether elastic may begin another generation of workers after the present one."""
        self._remaining_restarts = int(allowed)

    def processes(self) -> list[Any]:
        """Returns the processes of the workers, by local rank."""
        assert isinstance(self._pcontext, MultiprocessContext)
        assert self._pcontext._pc is not None
        return list(self._pcontext._pc.processes)

    def returned(self) -> dict[int, Any]:
        """Returns the return values of the workers that have returned so far, by local rank."""
        assert isinstance(self._pcontext, MultiprocessContext)
        returned: dict[int, Any] = self._pcontext._return_values
        return returned

    def await_workers(self, seconds: float) -> None:
        """Wait until all workers have ended, at most `seconds`."""
        assert self._pcontext is not None
        self._pcontext.wait(seconds, period=0.05)

    # The methods that elastic calls, always with the workers of this machine

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self.meet()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        return self.start()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        return self.look()

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self.restart()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, *patience: int, **named: int) -> None:
        # A worker that still lives has had the chance to save. Some versions of torch have no timeout here.
        super()._shutdown(signal.SIGKILL, *patience, **named)
