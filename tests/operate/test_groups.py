from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dico_ray.config import ConfigError
from dico_ray.operate.groups import READ_CPUS, training_nodes, worker_groups
from tests.kuberay import config_for


@pytest.mark.parametrize(("workers", "nodes"), [(1, 1), (8, 1), (16, 2), (64, 8)])
def test_a_gpu_each(workers: int, nodes: int) -> None:
    config = config_for(train={"global_batch": 1024, "num_workers": workers})
    (train,) = worker_groups(config)
    assert (train.replicas, train.least, train.most, train.gpus) == (nodes, nodes, nodes, 8)


def test_a_range_of_workers_is_a_range_of_nodes() -> None:
    config = config_for(train={"global_batch": 1024, "num_workers": [32, 64]})
    (train,) = worker_groups(config)
    assert (train.replicas, train.least, train.most) == (4, 4, 8), "KubeRay submits when all are ready"
    (fixed,) = worker_groups(config_for(train=config.train.model_dump(), cluster={"autoscale": False}))
    assert (fixed.replicas, fixed.least, fixed.most) == (8, 8, 8)


def test_data_nodes() -> None:
    data = worker_groups(config_for(cluster={"data_nodes": [1, 4], "data_cpus": 7}))[1]
    assert (data.name, data.replicas, data.least, data.most, data.cpus, data.gpus) == ("data", 1, 1, 4, 7, 0)
    data = worker_groups(config_for(cluster={"data_nodes": [1, 4], "autoscale": False}))[1]
    assert (data.replicas, data.least, data.most) == (4, 4, 4)


def test_a_node_that_cannot_hold_its_workers_is_refused() -> None:
    sizes = {"train": {"num_workers": 8}, "resources": {"worker_cpus": 12}}
    assert worker_groups(config_for(**sizes, cluster={"node_cpus": 97}))
    with pytest.raises(
        ConfigError, match=r"cluster.node_cpus: 96: 8 workers of a node take resources.worker_cpus = 12"
    ):
        worker_groups(config_for(**sizes, cluster={"node_cpus": 96}))
    assert worker_groups(config_for(**sizes, cluster={"node_cpus": 96, "data_nodes": [1, 1]}))


@given(st.integers(1, 64), st.floats(0.25, 4), st.floats(2, 64))
def test_cpu_nodes_hold_their_workers_and_the_reads(workers: int, each: float, cpus: float) -> None:
    config = config_for(
        train={"global_batch": workers, "num_workers": workers},
        resources={"worker_cpus": each},
        cluster={"gpus_per_node": 0, "node_cpus": cpus},
    )
    try:
        nodes = training_nodes(config, workers)
    except ConfigError:
        assert cpus - READ_CPUS < each
        return
    on_fullest = -(-workers // nodes)
    assert on_fullest * each + READ_CPUS <= cpus + 1e-9
    assert nodes == 1 or -(-workers // (nodes - 1)) * each + READ_CPUS > cpus - 1e-9
