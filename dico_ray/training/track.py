"""A run's numbers to tracking services as well: Weights & Biases, MLflow. Packages of the extra `track`.

Each service finds its server and credentials in its own environment variables (WANDB_API_KEY, WANDB_MODE,
MLFLOW_TRACKING_URI, ...). Continuing a run continues its record there.
"""

from __future__ import annotations

import operator
import tempfile
from typing import Any, Protocol

import xxhash

from dico_ray.config import ConfigError

PROJECT = "dico-ray"


class Tracker(Protocol):
    def log(self, metrics: dict[str, Any]) -> None:
        """metrics: plain numbers by name, `step` among them."""
        ...

    def close(self) -> None: ...


class _WandB:
    def __init__(self, wandb: Any, url: str, name: str, config: dict[str, Any]) -> None:
        self._run = wandb.init(
            project=PROJECT, id=_identifier(url), name=name, config=config, resume="allow",
            dir=tempfile.mkdtemp(prefix="wandb-"), settings=wandb.Settings(silent=True),
        )  # fmt: skip
        # The x axis is our own step: a resumed run may log a step again, which W&B's own counter refuses.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, Any]) -> None:
        self._run.log(metrics)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, mlflow: Any, url: str, name: str, config: dict[str, Any]) -> None:
        client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(PROJECT).experiment_id
        tag = _identifier(url)
        known = client.search_runs([experiment], f"tags.dico_ray = '{tag}'", max_results=1)
        run = known[0] if known else client.create_run(experiment, run_name=name, tags={"dico_ray": tag})
        self._client, self._id = client, run.info.run_id
        if not known:
            for section, settings in config.items():
                for key, value in settings.items() if isinstance(settings, dict) else ():
                    client.log_param(self._id, f"{section}.{key}", value)

    def log(self, metrics: dict[str, Any]) -> None:
        for key, value in metrics.items():
            if key != "step":
                self._client.log_metric(self._id, key, value, step=metrics["step"])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _identifier(url: str) -> str:
    """The same for every attempt of one run."""
    return xxhash.xxh3_64_hexdigest(url.encode())


#                     the tracker, and where its package keeps the error that it raises
_SERVICES = {"wandb": (_WandB, "errors.Error"), "mlflow": (_MLflow, "exceptions.MlflowException")}


def open_tracker(service: str, url: str, name: str, config: dict[str, Any]) -> Tracker:
    """Begins, or continues, the record of the run at `url` with a service ('wandb' or 'mlflow').

    Raises ConfigError if its package is missing, or the service turns the run away.
    """
    try:
        module = __import__(service)
    except ImportError:
        raise ConfigError(f"run.track: {service} is not installed; pip install 'dico-ray[track]'") from None
    tracker, error_name = _SERVICES[service]
    refused: type[Exception] = operator.attrgetter(error_name)(module)
    try:
        return tracker(module, url, name, config)
    except refused as error:
        raise ConfigError(f"run.track: {service}: {' '.join(str(error).split())[:300]}") from None
