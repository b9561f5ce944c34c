"""Whether a cluster can do what a job asks for. Pure."""

from __future__ import annotations

from service.cluster.driver import Capacity
from service.planning.price import Price, needs


def capacity_problems(price: Price, capacity: Capacity, gpu_memory_bytes: int) -> list[str]:
    """Why no node can take the biggest task: Ray would wait for one for ever."""
    wanted = needs(price, gpu_memory_bytes)
    problems = []
    if wanted.memory_bytes > capacity.max_node_memory_bytes:
        problems.append(
            f"the biggest task ({price.worst}) needs {wanted.memory_bytes} bytes of memory, and the largest node "
            f"of the cluster offers {capacity.max_node_memory_bytes}: lower worker_memory_bytes or add a larger one"
        )
    if wanted.gpus > 1:
        problems.append(
            f"a task needs up to {price.gpu_bytes} bytes of GPU memory, and each GPU has "
            f"{gpu_memory_bytes} (MERGEMILL_GPU_MEMORY_BYTES): use bigger ones, or set it to 0 to compute on CPUs"
        )
    elif wanted.gpus > capacity.gpus:
        problems.append(
            f"the tasks compute on a GPU (MERGEMILL_GPU_MEMORY_BYTES is set), and the cluster offers "
            f"{capacity.gpus:g}: add a node with one, or set it to 0 to compute on CPUs"
        )
    return problems
