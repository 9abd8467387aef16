"""Where the shards of a verb are worked on, if not in this process: on the machines of a Ray cluster, or on
whatever an :class:`Executor` of the caller's own reaches."""

from .carrying import Call, Carried
from .executor import Executor
from .kept import kept, workers_of
from .ray_executor import RayExecutor

__all__ = ["Call", "Carried", "Executor", "RayExecutor", "kept", "workers_of"]
