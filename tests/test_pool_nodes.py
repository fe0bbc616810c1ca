"""A pool over two nodes, one of which is lost: what its actor held is done elsewhere, though no other finds room."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from dico_ray import cluster, pool

pytestmark = pytest.mark.ray


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head without room, and two nodes for an actor each."""
    cluster.quiet()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@ray.remote(num_cpus=1)
class Slow:
    """Takes a while over a piece, and tells its node."""

    def work(self, piece: int) -> tuple[int, str]:
        time.sleep(0.1)
        return piece, ray.get_runtime_context().get_node_id()


def test_a_lost_node_loses_nothing(nodes: Cluster) -> None:
    found: list[int] = []
    seen: list[str] = []
    lost: str | None = None
    remover: threading.Thread | None = None
    for piece, (same, node) in pool.run(Slow.remote, 2, range(80)):
        assert piece == same
        found.append(piece)
        seen.append(node)
        if lost is None and len(set(seen)) == 2:
            victim = nodes.list_all_nodes()[-1]
            lost = victim.node_id
            remover = threading.Thread(target=nodes.remove_node, args=(victim, False))
            remover.start()
    assert remover is not None
    remover.join()
    assert sorted(found) == list(range(80))
    assert lost in seen
    assert set(seen[-10:]) == set(seen) - {lost}
