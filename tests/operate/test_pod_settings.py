from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dico_ray.config import ConfigError
from dico_ray.operate.pod_settings import kubernetes_name, settings_for_pods
from dico_ray.recipes import RECIPES, resolve
from tests.kuberay import config_for


@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    train=st.fixed_dictionaries(
        {},
        optional={
            "lr": st.floats(1e-6, 1e-2), "steps": st.integers(10_000, 10**7), "flip": st.booleans(),
            "micro_batch": st.just(1), "num_workers": st.sampled_from([1, 2, 8, (1, 8)]), "betas": st.just((0.8, 0.9)),
        },
    ),
    depths=st.none() | st.tuples(*[st.integers(1, 9)] * 5),
)  # fmt: skip
def test_a_pod_reads_the_same_run(
    tmp_path_factory: pytest.TempPathFactory, recipe: str, train: dict[str, Any], depths: Any
) -> None:
    config = config_for(recipe, train=train, model={"depths": depths} if depths else {})
    file = tmp_path_factory.mktemp("pod") / "run.yaml"
    file.write_text(yaml.safe_dump(settings_for_pods(config)))
    there = resolve(None, str(file), {})
    assert there.model_dump(exclude={"cluster"}) == config.model_dump(exclude={"cluster"})


def test_nothing_of_this_machine_is_in_it() -> None:
    text = yaml.safe_dump(settings_for_pods(config_for("tiny-cpu")))
    assert "/" not in text.replace("s3://bucket/", "")
    assert "cluster" not in text


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "runs on this machine": ({"run": {"storage": "runs"}}, "run.storage: .* is a folder of this machine"),
    "latents on this machine": ({"data": {"latents": "/home/me/latents"}}, "data.latents: /home/me/latents"),
    "another folder": ({"evaluate": {"reference": "/home/me/digits"}}, "evaluate.reference: /home/me/digits"),
    "beside the volume": (
        {"run": {"storage": "/database"}, "cluster": {"storage_claim": "disk"}},
        "run.storage: /database .* a folder in /data/",
    ),
    "credentials as options": ({"storage": {"options": {"secret": "hush"}}}, "cluster.credentials_secret"),
    "a login in a URL": ({"storage": {"endpoint": "http://me:hush@host:9000"}}, "endpoint: the URL holds a login"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_pods_cannot_have_is_refused(name: str) -> None:
    sections, says = WRONG[name]
    with pytest.raises(ConfigError, match=says) as error:
        settings_for_pods(config_for(**sections))
    assert "hush" not in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_in_the_volume_and_caches_of_the_node_are_fine() -> None:
    cluster = {"storage_claim": "disk", "storage_path": "/data"}
    folders = {"run": {"storage": "/data/runs"}, "data": {"latents": "/data/latents", "cache": "/dev/shm/cache"}}
    found = settings_for_pods(config_for(**folders, cluster=cluster))
    assert (found["run"]["storage"], found["data"]["cache"]) == ("/data/runs", "/dev/shm/cache")
    with pytest.raises(ConfigError, match="run.storage: /dev/shm/runs"):
        settings_for_pods(config_for(run={"storage": "/dev/shm/runs"}, cluster=cluster))


def test_names() -> None:
    assert kubernetes_name(config_for(run={"name": "DiCo_XL.512"}), 47) == "dico-xl-512"
    for name, says in (("7up", "begins with a letter"), ("dico-", "ends in no sign"), ("d" * 48, "takes 47")):
        with pytest.raises(ConfigError, match=says):
            kubernetes_name(config_for(run={"name": name}), 47)
