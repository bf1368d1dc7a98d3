"""The executor that a runtime asks for."""

from collections.abc import Callable

from configs.errors import UserError
from configs.schema import WorkersRuntime
from pipeline.driver import Executor, Result, Worker


def make_executor(make_worker: Callable[[], Worker[Result]], runtime: WorkersRuntime) -> Executor[Result]:
    """Actors on a Ray cluster, or this process.

    Args:
        make_worker: builds a worker where it will run; picklable.
        runtime: which executor, and its resources.

    Raises:
        UserError: Ray is not installed, the cluster has no room for an actor, or this machine lacks the GPU.
    """
    if runtime.executor == "ray":
        try:
            from pipeline.ray_executor import RayExecutor
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise UserError(
                "runtime.executor: ray is not installed; pip install 'potstill[ray]' or choose in-process"
            ) from None
        return RayExecutor(make_worker, runtime)
    from pipeline.in_process_executor import InProcessExecutor

    return InProcessExecutor(make_worker, runtime)
