"""A Ray cluster of three nodes on this machine, one of which can be killed."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import psutil

JOB_NODES = 2
# Ray reports to its makers otherwise; and else it takes the machine's own address for 127.0.0.1,
# and listens there. Also for who connects to the nodes, from another process.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def installed() -> bool:
    """Whether ray and prefect-ray are here (pip install '.[ray]')."""
    return all(importlib.util.find_spec(name) for name in ("ray", "prefect_ray"))


class RayNodes:
    """A head that runs no jobs, and JOB_NODES with one CPU each, listening on 127.0.0.1 only.

    env: set in the environment of all nodes, so of all jobs.
    """

    def __init__(self, env: dict[str, str] | None = None) -> None:
        before = dict(os.environ)
        os.environ.update((env or {}) | ENVIRONMENT)
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        # Another may have imported ray before: it reads the variable only then.
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            head = {"num_cpus": 0, "node_ip_address": "127.0.0.1", "include_dashboard": False}
            self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
            self.complete()
        finally:
            os.environ.clear()
            os.environ.update(before)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def __len__(self) -> int:
        """How many nodes for jobs there are."""
        return len(self._cluster.worker_nodes)

    def complete(self) -> None:
        """Start nodes for those that were killed."""
        while len(self) < JOB_NODES:
            self._cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")

    def kill(self, number: int) -> int:
        """SIGKILL of all processes of one node, in the order of their pids; the raylet's pid."""
        return self._kill(sorted(self._cluster.worker_nodes, key=_raylet)[number])

    def kill_with(self, pid: int) -> int:
        """SIGKILL of the node that runs this job; the raylet's pid."""
        above = {parent.pid for parent in psutil.Process(pid).parents()}
        (node,) = [node for node in self._cluster.worker_nodes if _raylet(node) in above]
        return self._kill(node)

    def _kill(self, node: Any) -> int:
        pid = _raylet(node)
        self._cluster.remove_node(node, allow_graceful=False)
        return pid

    def stop(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)
