"""The Kubernetes cluster that a run is rendered for."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dico_ray.config.base import Section

_SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE", re.IGNORECASE)

Count = Annotated[int, Field(ge=0)]
KubernetesName = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$")]


class Cluster(Section):
    """The Kubernetes cluster that `dico-ray render` writes manifests for."""

    image: str = ""
    "Container image with dico-ray, as cluster/Dockerfile builds it, with a tag or digest."
    pull_secret: KubernetesName = ""
    "Secret with the registry's login; unset: the image is public, or the nodes have the login."
    ray_version: str = Field("2.60.0", pattern=r"^\d+\.\d+\.\d+$")
    "Ray's version in the image."
    gpus_per_node: Count = 8
    "GPUs of a training node; 0: training runs on CPUs."
    node_cpus: float = Field(96.0, gt=0)
    "CPUs that a training node's pod gets."
    node_memory_gb: int = Field(800, ge=1)
    "Memory that a training node's pod gets."
    node_labels: dict[str, str] = Field(default_factory=dict)
    "Labels that a training node must have, as {cloud.google.com/gke-accelerator: nvidia-h100-80gb}."
    node_resources: dict[str, int] = Field(default_factory=dict)
    "Further devices of a training node, as {rdma/ib: 8}."
    data_nodes: tuple[Count, Count] = (0, 0)
    "Fewest and most CPU nodes for Ray Data, as [min,max]; [0,0]: the training nodes' CPUs read."
    data_cpus: float = Field(16.0, gt=0)
    "CPUs that a data node's pod gets."
    data_memory_gb: int = Field(64, ge=1)
    "Memory that a data node's pod gets."
    head_cpus: float = Field(4.0, gt=0)
    "CPUs of the head's pod; Ray places no work there but the run's own command."
    head_memory_gb: int = Field(16, ge=4)
    "Memory of the head's pod."
    shm_share: float = Field(0.4, gt=0, lt=1)
    "Share of a pod's memory that /dev/shm may take: Ray's object store wants 0.3, NCCL some more."
    scratch_gb: int = Field(100, ge=1)
    "Disk of a pod for logs, spilled objects and compiled kernels (all else is read-only)."
    autoscale: bool = True
    "Let Ray's autoscaler add and remove nodes where a group has a range."
    idle_s: int = Field(300, ge=60)
    "Seconds without work after which the autoscaler removes a node."
    spot: bool = False
    "Put training and data nodes on spot machines; the head never is."
    spot_label: str = Field("cloud.google.com/gke-spot=true", pattern=r"^[^=\s]+=[^=\s]+$")
    "The label, KEY=VALUE, of the cloud's spot nodes (and their taint, if they have one)."
    spot_notice_s: int = Field(25, ge=5)
    "Seconds that the cloud leaves between a spot machine's notice and its end."
    stop_wait_s: int = Field(600, ge=10)
    "Seconds that training has to commit a checkpoint after it was asked to stop."
    retries: int = Field(10, ge=0)
    "New attempts by KubeRay after a job failed, each on a new Ray cluster; training continues at its checkpoint."
    keep_s: int = Field(600, ge=0)
    "Seconds for which a finished job's Ray cluster stays."
    redis: str = ""
    "host:port of a Redis that keeps the head's state, so that a restarted head finds its nodes; unset: none."
    redis_secret: KubernetesName = ""
    "Secret whose key `password` is that Redis's password."
    scheduler: Literal["default", "kueue", "volcano"] = "default"
    "What admits the pods together or not at all: Kueue, Volcano, or nothing."
    queue: KubernetesName = ""
    "Queue of Kueue (a LocalQueue) or Volcano."
    credentials_secret: KubernetesName = ""
    "Secret whose keys become environment variables: the object store's AWS_... names, WANDB_API_KEY."
    service_account: KubernetesName = ""
    "Service account bound to a cloud identity that may use the object store, instead of such a secret."
    storage_claim: KubernetesName = ""
    "PersistentVolumeClaim that every pod mounts at storage_path, for runs without an object store."
    storage_path: str = Field("/data", pattern=r"^/[A-Za-z0-9._/-]+$")
    "Where that volume is mounted; run.storage and data.latents may then be folders in it."
    env: dict[str, str] = Field(default_factory=lambda: {"NCCL_DEBUG": "WARN"})
    "Environment variables of every pod, NCCL's settings among them; never credentials."
    auth: Literal["token", "disabled"] = "token"
    "Ray's token authentication; disabled: whoever reaches a pod's port runs code in it."
    auth_secret: KubernetesName = "dico-ray-auth"
    "Secret whose key `auth_token` is that token."
    monitoring_namespace: KubernetesName = ""
    "Namespace of the Prometheus that may read the pods' metrics; unset: none may."
    evaluate_schedule: str = Field("0 3 * * *", pattern=r"^\S+( \S+){4}$")
    "When the rendered CronJob submits an evaluation: minute, hour, day, month, weekday (UTC)."

    @model_validator(mode="after")
    def _fits_together(self) -> Cluster:
        low, high = self.data_nodes
        if low > high:
            raise ValueError(f"cluster.data_nodes: [{low}, {high}] must be [least, most]")
        for name in self.env:
            if _SECRET.search(name):
                raise ValueError(
                    f"cluster.env: {name} looks like a credential, and manifests hold none; "
                    "put it into the secret that cluster.credentials_secret names"
                )
        if self.scheduler == "kueue" and self.autoscale:
            raise ValueError("cluster.autoscale: true, but Kueue admits Ray clusters of a fixed size; set it false")
        if self.queue and self.scheduler == "default":
            raise ValueError(f"cluster.queue: {self.queue} needs cluster.scheduler kueue or volcano")
        if self.scheduler == "kueue" and not self.queue:
            raise ValueError("cluster.queue: unset, and Kueue needs the name of a LocalQueue; set it")
        if self.redis_secret and not self.redis:
            raise ValueError("cluster.redis_secret needs cluster.redis, the address")
        return self
