"""How many nodes of which kind a run's cluster has."""

from __future__ import annotations

from dataclasses import dataclass

from dico_ray.config import Config, ConfigError

# CPUs that a training node keeps for Ray Data's reads and Ray's own actors, where no data nodes do that.
READ_CPUS = 1.0


@dataclass(frozen=True)
class Group:
    """Nodes of one kind: how many at first, at least and at most, and what each has."""

    name: str
    replicas: int
    least: int
    most: int
    cpus: float
    memory_gb: int
    gpus: int = 0


def worker_groups(config: Config) -> list[Group]:
    """The training nodes, and the nodes for Ray Data if there are any.

    Raises ConfigError if a training node cannot hold its workers.
    """
    cluster = config.cluster
    low, high = config.train.worker_range
    least, most = training_nodes(config, low), training_nodes(config, high)
    # KubeRay submits the run when all replicas are ready: with the autoscaler it begins on the fewest it may have.
    first = least if cluster.autoscale else most
    found = [Group("train", first, *_range(config, least, most), cluster.node_cpus, cluster.node_memory_gb,
                   cluster.gpus_per_node)]  # fmt: skip
    if cluster.data_nodes[1]:
        least, most = cluster.data_nodes
        first = least if cluster.autoscale else most
        found.append(Group("data", first, *_range(config, least, most), cluster.data_cpus, cluster.data_memory_gb))
    return found


def _range(config: Config, least: int, most: int) -> tuple[int, int]:
    """Without the autoscaler a group has one size, and KubeRay wants both ends of the range to say so."""
    return (least, most) if config.cluster.autoscale else (most, most)


def training_nodes(config: Config, workers: int) -> int:
    """Nodes that hold so many training workers: one GPU each, or, without GPUs, resources.worker_cpus each."""
    cluster, worker_cpus = config.cluster, config.resources.worker_cpus
    left = cluster.node_cpus - (0 if cluster.data_nodes[0] else READ_CPUS)
    fit = int(left / worker_cpus)
    each = cluster.gpus_per_node or fit
    if fit < max(1, min(each, workers)):
        raise ConfigError(
            f"cluster.node_cpus: {cluster.node_cpus:g}: {min(max(each, 1), workers)} workers of a node take "
            f"resources.worker_cpus = {worker_cpus:g} CPUs each, and reading {cluster.node_cpus - left:g}; raise it"
        )
    return -(-workers // each)
