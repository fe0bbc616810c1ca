"""A real Prometheus for tests, on a port of its own, with whatever rules and targets a test gives it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters import ROOT, free_port

RULES = ROOT / "cluster" / "prometheus" / "alerts.yaml"


def binary(name: str) -> str:
    """Prometheus's program of that name; skips the test where there is none, but fails in CI."""
    found = shutil.which(name)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(f"no {name}: apt-get install -y prometheus")
    if found is None:
        pytest.skip(f"no {name}: apt-get install -y prometheus")
    return found


@dataclass(frozen=True)
class Prometheus:
    url: str

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def names(self) -> set[str]:
        """Of every metric that was ever scraped."""
        return set(self.get("label/__name__/values"))

    def firing(self) -> set[tuple[str, str]]:
        """(alert, run) of what fires now."""
        alerts = self.get("alerts")["alerts"]
        return {(a["labels"]["alertname"], a["labels"].get("run", "")) for a in alerts if a["state"] == "firing"}


@contextmanager
def prometheus(folder: Path, targets: Path, rules: dict[str, Any] | None = None) -> Iterator[Prometheus]:
    """Scrapes the nodes that Ray's head lists in the file `targets`, every second."""
    program = binary("prometheus")
    config = yaml.safe_load((ROOT / "cluster" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": "2s"}]
    (folder / "alerts.yaml").write_text(yaml.safe_dump(rules) if rules else RULES.read_text())
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 180
        while True:
            try:
                found.get("status/runtimeinfo")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                assert time.monotonic() < deadline, "Prometheus does not answer"
                time.sleep(0.2)
        yield found
    finally:
        process.kill()
        process.wait()
