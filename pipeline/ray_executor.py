"""Shards on a Ray cluster. The only file that imports Ray.

One actor holds one worker; one call makes one shard; images never enter the object store. Why actors and an own
``ray.wait`` loop instead of Ray Data: a shard must be a fixed unit of work with its own commit, so that a driver that
dies loses no finished shard and a retry cannot write a second copy under another name.

* ``max_task_retries=0``: Ray never repeats a call by itself; the driver decides, and commits are idempotent anyway.
* ``max_restarts=-1``: Ray brings a dead actor back wherever there is room. No shard is given to an actor before its
  ``load`` has returned, so none waits for a node that is gone.
* ``max_concurrency``: two calls overlap in an actor, one at the device, one reading, or encoding and uploading.
* Without ``runtime.actors`` their number follows the cluster: looked up every few seconds, grown and shrunk. With it,
  actors that find no room stay pending, which is what an autoscaler acts upon.
* An actor that fails shard after shard, while others do not, rests and is then replaced.
"""

import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError, RayTaskError

from configs.errors import RunStopped, UserError
from configs.schema import WorkersRuntime
from pipeline.driver import Outcome, Result, Worker

_SLOTS_PER_ACTOR = 2
_LOOK_AT_CLUSTER_EVERY_S = 5.0
_MAX_FAILED_LOADS = 10
"""Loads that may fail one after the other while no actor is up."""
_MAX_FAILED_SHARDS = 3
"""Different shards that may fail at an actor one after the other before it is replaced."""
_REST_S = 5.0
"""Seconds an actor rests per shard it failed, while others are sound."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ROOT = Path(__file__).resolve().parents[1]


class _Actor(Generic[Result]):
    """Holds a worker. Loading is a call of its own: an actor whose constructor raises cannot say why."""

    def __init__(self, make_worker: Callable[[], Worker[Result]]) -> None:
        self._make_worker = make_worker
        self._worker: Worker[Result] | None = None
        self._loading = threading.Lock()

    def load(self) -> str:
        """Build the worker, if this process has none yet; returns the node's address."""
        with self._loading:
            self._worker = self._worker or self._make_worker()
        return ray.util.get_node_ip_address()

    def run(self, shard: int, attempt: int) -> Result:
        """Make one shard. An actor that Ray restarted behind the driver's back loads first."""
        if self._worker is None:
            self.load()
        assert self._worker is not None
        return self._worker.run(shard, attempt)


@dataclass
class _Handle:
    """The driver's view of an actor."""

    number: int
    actor: Any
    loading: Any
    node: str = ""
    ready: bool = False
    died: bool = False  # since it was last ready
    running: dict[Any, tuple[int, float]] = field(default_factory=dict)
    idle_since: float = 0.0
    failed_shards: set[int] = field(default_factory=set)  # since its last success
    resting_until: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.node}#{self.number}"


def connect() -> None:
    """Join the cluster of the job or of RAY_ADDRESS, else one on this machine, else start one for this process.

    A handler of SIGTERM that is installed stays. Where there is none, Ray installs one that ends the process.

    Raises:
        UserError: RAY_ADDRESS is no address.
        RunStopped: RAY_ADDRESS is that of a cluster that does not answer.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        with _own_sigterm_handler(), _one_attempt() if address else nullcontext():
            ray.init(log_to_driver=False, configure_logging=False)
    except ValueError as error:
        if address is None or "address" not in str(error):
            raise
        raise UserError(f"RAY_ADDRESS {address}: {error}; give host:port, ray://host:port or auto") from None
    except (ConnectionError, RuntimeError) as error:
        if address is None or (isinstance(error, RuntimeError) and "connect to GCS" not in str(error)):
            raise
        raise RunStopped(
            f"RAY_ADDRESS {address}: no Ray cluster answers there; start one and run the same command again"
        ) from error


@contextmanager
def _one_attempt() -> Generator[None]:
    """Have Ray try once to reach a head. By itself it tries 20 times, each of which takes it 40 seconds."""
    name = "RAY_gcs_server_port_wait_time_s"  # read as the number of attempts; a user's own value is left alone
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _own_sigterm_handler() -> Generator[None]:
    """Put back the handler of SIGTERM that ``ray.init`` replaces by one that ends the process at once.

    Not where there was none, nor one of C code (None), which Python cannot install; nor in another thread than the main
    one, where Ray installs none either.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        is_pythons = handler is not None and handler != signal.SIG_DFL
        if is_pythons and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


class RayExecutor(Generic[Result]):
    """Runs workers as actors on the cluster this process is connected to.

    Args:
        make_worker: builds a worker inside an actor; picklable.
        runtime: resources of an actor, number of actors.

    Raises:
        UserError: the cluster has no room for a single actor.
    """

    def __init__(self, make_worker: Callable[[], Worker[Result]], runtime: WorkersRuntime) -> None:
        connect()
        self._make_worker = make_worker
        self._runtime = runtime
        self._handles: list[_Handle] = []
        self._next_number = 0
        self._failed_loads = 0  # since an actor was last brought up
        self._num_loaded = 0
        self._looked_at_cluster = -math.inf
        self._asked_for_node = False
        try:
            self._check_resources()
        except BaseException:  # also a signal, while it waits
            self._withdraw_request()
            raise

    @property
    def in_flight(self) -> int:
        """Attempts submitted and not yet reported."""
        return sum(len(handle.running) for handle in self._handles)

    @property
    def num_workers(self) -> int:
        """Actors that are up."""
        return sum(handle.ready for handle in self._handles)

    def free_slots(self, num_waiting: int) -> int:
        """How many of ``num_waiting`` shards it can take now; also where the number of actors is adapted.

        A second shard is queued at an actor only while there is enough left for all: towards the end a shard that
        waits behind another one could be made by an idle actor.
        """
        self._follow_cluster(num_waiting)
        able = self._able()
        per_actor = _SLOTS_PER_ACTOR if num_waiting >= len(able) else 1
        return min(num_waiting, sum(max(0, per_actor - len(handle.running)) for handle in able))

    def submit(self, shard: int, attempt: int) -> None:
        """Start an attempt at the least busy actor."""
        handle = min(self._able(), key=lambda handle: len(handle.running))
        handle.running[handle.actor.run.remote(shard, attempt)] = (shard, time.monotonic())

    def wait(self, timeout_s: float) -> list[Outcome[Result]]:
        """Outcomes since the last call; waits for at most ``timeout_s`` if there are none yet.

        Raises:
            UserError: the first actor found a mistake of the user's, such as other weights at the given path.
            RunStopped: no actor can be brought up.
        """
        owners: dict[Any, _Handle] = {}
        for handle in self._handles:
            if not handle.ready:
                owners[handle.loading] = handle
            owners.update(dict.fromkeys(handle.running, handle))
        if not owners:
            time.sleep(timeout_s)
            return []
        refs = list(owners)
        done, _ = ray.wait(refs, timeout=timeout_s)
        if done:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        outcomes: list[Outcome[Result]] = []
        for ref in done:
            handle = owners[ref]
            if ref in handle.running:
                outcomes.extend(self._outcomes(handle, ref))
            elif ref == handle.loading:
                self._loaded(handle)
        return outcomes

    def close(self) -> None:
        """Kill the actors. Whatever they still do is not committed, or is a whole commit."""
        for handle in self._handles:
            ray.kill(handle.actor)
        self._handles.clear()
        self._withdraw_request()

    def _able(self) -> list[_Handle]:
        """The actors that may be given work.

        One that failed rests while another is sound: a broken device fails at once, is idle first, and would otherwise
        be handed every shard there is.
        """
        ready = [handle for handle in self._handles if handle.ready]
        now = time.monotonic()
        if any(not handle.failed_shards for handle in ready):
            return [handle for handle in ready if now >= handle.resting_until]
        return ready

    def _outcomes(self, handle: _Handle, ref: Any) -> list[Outcome[Result]]:
        now = time.monotonic()
        lost_seconds = now - max(handle.running[ref][1], handle.idle_since)
        handle.idle_since = now
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            handle.failed_shards.add(handle.running[ref][0])
            handle.resting_until = now + _REST_S * len(handle.failed_shards)
            cause, details = error.cause or error, _COLOUR.sub("", str(error))
            if len(handle.failed_shards) >= _MAX_FAILED_SHARDS and any(
                not other.failed_shards for other in self._handles
            ):
                # One shard after the other fails here and not elsewhere: blame the actor and take a new one.
                self._drop(handle)
                return self._lose_all(handle, cause, details, lost_seconds)
            shard, _ = handle.running.pop(ref)
            return [Outcome(shard, handle.name, error=cause, details=details, lost_seconds=lost_seconds)]
        except RayError as error:
            # Everything the actor had dies with it. Ray restarts it where there is room; it gets no shard until then.
            handle.ready, handle.died, handle.loading = False, True, handle.actor.load.remote()
            return self._lose_all(handle, error, str(error), lost_seconds)
        handle.failed_shards.clear()
        shard, _ = handle.running.pop(ref)
        return [Outcome(shard, handle.name, result=result)]

    def _lose_all(
        self, handle: _Handle, error: BaseException, details: str, lost_seconds: float
    ) -> list[Outcome[Result]]:
        """Crashes of every shard an actor had; the time is lost once."""
        shards = [shard for shard, _ in handle.running.values()]
        handle.running.clear()
        return [
            Outcome(
                shard, handle.name, error=error, details=details, crashed=True, lost_seconds=lost_seconds * (n == 0)
            )
            for n, shard in enumerate(shards)
        ]

    def _loaded(self, handle: _Handle) -> None:
        try:
            handle.node = ray.get(handle.loading)
        except RayError as error:
            self._drop(handle)
            if handle.died and not isinstance(error, RayTaskError):
                return  # it is dead still: its node is lost. A new one is started as soon as there is room
            self._failed_loads += 1
            cause = getattr(error, "cause", None) or error
            print(f"an actor could not load what it needs ({type(cause).__name__}: {_first_line(cause)})", flush=True)
            if isinstance(cause, UserError) and self._num_loaded == 0:
                raise cause from None
            if self._failed_loads >= _MAX_FAILED_LOADS and self.num_workers == 0:
                raise RunStopped(f"no actor can load what it needs: {_first_line(cause)}") from error
        else:
            handle.ready, handle.died, handle.idle_since = True, False, time.monotonic()
            handle.failed_shards.clear()
            self._failed_loads, self._num_loaded = 0, self._num_loaded + 1

    def _drop(self, handle: _Handle) -> None:
        ray.kill(handle.actor)
        self._handles.remove(handle)

    def _follow_cluster(self, num_waiting: int) -> None:
        now = time.monotonic()
        if now - self._looked_at_cluster < _LOOK_AT_CLUSTER_EVERY_S and self._handles:
            return
        self._looked_at_cluster = now
        wanted = self._runtime.actors or self._room()
        wanted = min(wanted, num_waiting + self.in_flight)
        while len(self._handles) < wanted:
            self._start_actor()
        for handle in [handle for handle in self._handles if not handle.ready][: max(0, len(self._handles) - wanted)]:
            self._drop(handle)

    def _start_actor(self) -> None:
        options: dict[str, Any] = {
            "num_cpus": self._runtime.cpus_per_actor,
            "num_gpus": self._runtime.gpus_per_actor,
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": _SLOTS_PER_ACTOR,
        }
        if "working_dir" not in ray.get_runtime_context().runtime_env:
            options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(_ROOT)}}
        actor = ray.remote(_Actor).options(**options).remote(self._make_worker)
        self._handles.append(_Handle(self._next_number, actor, actor.load.remote()))
        self._next_number += 1

    def _room(self) -> int:
        """How many actors fit on the nodes that are alive, side by side with nobody else."""
        needs = {name: need for name, need in self._needs().items() if need > 0}
        return sum(
            min(math.floor(node["Resources"].get(name, 0) / need + 1e-9) for name, need in needs.items())
            for node in ray.nodes()
            if node["Alive"]
        )

    def _check_resources(self) -> None:
        """Make sure that an actor fits on some node, waiting for nodes to come if asked to."""
        runtime = self._runtime
        deadline = time.monotonic() + runtime.wait_for_resources_s
        while self._room() == 0:
            if time.monotonic() >= deadline:
                what = f"{runtime.cpus_per_actor:g} CPUs and {runtime.gpus_per_actor:g} GPUs"
                key = "runtime.gpus_per_actor" if runtime.gpus_per_actor > 0 else "runtime.cpus_per_actor"
                raise UserError(
                    f"{key}: no node of the cluster has {what} for one actor; ask for less, "
                    "or set runtime.wait_for_resources_s if nodes are still to come"
                )
            self._asked_for_node = True
            request_resources(bundles=[{name: need for name, need in self._needs().items() if need > 0}])
            time.sleep(1.0)

    def _withdraw_request(self) -> None:
        """Let the autoscaler take the node back: it keeps up what was asked for until it is told otherwise.

        Not before the end. Where the node is lost meanwhile, with its actor, the request is what brings another one.
        """
        if self._asked_for_node:
            request_resources(bundles=[])
            self._asked_for_node = False

    def _needs(self) -> dict[str, float]:
        return {"CPU": self._runtime.cpus_per_actor, "GPU": self._runtime.gpus_per_actor}


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]
