from __future__ import annotations

from typing import Any

import pytest

from dico_ray.config import ConfigError
from dico_ray.settings import build

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a credential": ({"env": {"AWS_SECRET_ACCESS_KEY": "hush"}}, "AWS_SECRET_ACCESS_KEY looks like a credential"),
    "a token": ({"env": {"HF_TOKEN": "hush"}}, "HF_TOKEN looks like a credential"),
    "a range upside down": ({"data_nodes": [4, 1]}, r"cluster.data_nodes: \[4, 1\]"),
    "kueue and autoscaling": ({"scheduler": "kueue", "queue": "q"}, "cluster.autoscale: true, but Kueue"),
    "kueue without a queue": ({"scheduler": "kueue", "autoscale": False}, "cluster.queue: unset"),
    "a queue of nothing": ({"queue": "q"}, "cluster.queue: q needs cluster.scheduler"),
    "a password of nothing": ({"redis_secret": "s"}, "needs cluster.redis"),
    "a name with capitals": ({"auth_secret": "Token"}, "cluster.auth_secret"),
    "no version": ({"ray_version": "2.60"}, "cluster.ray_version"),
    "no schedule": ({"evaluate_schedule": "daily"}, "cluster.evaluate_schedule"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_work_are_told_in_one_line(name: str) -> None:
    cluster, says = WRONG[name]
    with pytest.raises(ConfigError, match=says) as error:
        build({"cluster": cluster})
    assert "\n" not in str(error.value)
    assert "hush" not in str(error.value)
