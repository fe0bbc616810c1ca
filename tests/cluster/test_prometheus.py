"""cluster/prometheus: its rules by promtool."""

from __future__ import annotations

import subprocess

import pytest
import yaml

from tests.watching import RULES, binary


@pytest.mark.parametrize("words", [("check", "rules", "alerts.yaml"), ("test", "rules", "alerts_test.yaml"),
                                   ("check", "config", "--syntax-only", "prometheus.yml")])  # fmt: skip
def test_promtool_finds_no_fault(words: tuple[str, ...]) -> None:
    told = subprocess.run([binary("promtool"), *words], cwd=RULES.parent, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    tested = yaml.safe_load(RULES.with_name("alerts_test.yaml").read_text())["tests"]
    fired = {t["alertname"] for part in tested for t in part["alert_rule_test"] if t.get("exp_alerts")}
    silent = {t["alertname"] for t in tested[0]["alert_rule_test"]}
    names = {rule["alert"] for rule in group["rules"]}
    assert fired == silent == names
    assert all({"summary", "mend"} <= rule["annotations"].keys() for rule in group["rules"])
