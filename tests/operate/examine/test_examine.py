"""Each examination, with a cluster or storage that has the fault it looks for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dico_ray.operate.examine import content, facts, gpus, nodes, store, traffic
from dico_ray.operate.examine.findings import Finding, good, show, to_json
from dico_ray.settings import build
from dico_ray.storage import Storage

GB = 1e9


def fact(**own: Any) -> dict[str, Any]:
    return {
        "versions": {"python": "3.11.2", "torch": "2.9.0", "numpy": "2.0.0"}, "shm_total": 10 * GB,
        "disk_free": 50 * GB, "disk_total": 100 * GB, "memory_free": 50 * GB, "memory_total": 100 * GB,
        "session": "/tmp/ray", **own,
    }  # fmt: skip


def verdicts(findings: list[Finding]) -> dict[str, str]:
    assert all(bool(f.mend) == (f.verdict != "good") for f in findings)
    return {f.check: f.verdict for f in findings}


def test_versions_that_differ_are_named_with_their_nodes() -> None:
    other = {"python": "3.11.2", "torch": "2.10.0", "numpy": "2.1.0"}
    found = nodes.agreement({"a": fact(), "b": fact(), "c": fact(versions=other)})
    assert verdicts(found) == {"version of python": "good", "version of torch": "bad", "version of numpy": "warning"}
    (torch,) = [f for f in found if f.check == "version of torch"]
    assert torch.found == "2.9.0 on 2 of 3 nodes; c has 2.10.0"


def test_a_package_that_all_lack_is_bad() -> None:
    (found,) = nodes.agreement({"a": fact(versions={"deepspeed": "missing"})})
    assert found.verdict == "bad"


def test_this_machine_tells_its_facts(tmp_path: Path) -> None:
    told = facts.of_this_node(str(tmp_path))
    assert set(told["versions"]) == {
        "python", "torch", "ray", "deepspeed", "numpy", "pyarrow", "safetensors", "dico_ray"
    }  # fmt: skip
    assert "missing" not in told["versions"].values()
    assert 0 < told["disk_free"] < told["disk_total"]
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize(
    ("skew", "verdict"),
    [((0.1, 0.001), "good"), ((-2.0, 0.001), "warning"), ((-60.0, 0.5), "bad"), ((2.0, 1.9), "good")],
)
def test_clocks(skew: tuple[float, float], verdict: str) -> None:
    (found,) = nodes.clocks({"a": skew})
    assert found.verdict == verdict


def test_room() -> None:
    calm = nodes.room({"a": fact()}, {"a": 9 * GB})
    assert set(verdicts(calm).values()) == {"good"}
    tight = nodes.room({"a": fact(disk_free=4 * GB, memory_free=15 * GB)}, {"a": 11 * GB})
    assert verdicts(tight) == {"shared memory": "bad", "disk": "bad", "memory": "warning"}
    assert "12.1 GB at /dev/shm" in tight[0].mend


@pytest.mark.parametrize(("cpus", "verdict"), [(9.0, "good"), (8.5, "warning"), (8.2, "bad"), (4.0, "bad")])
def test_cpus_left_for_reading(cpus: float, verdict: str) -> None:
    config = build({"train": {"num_workers": 8}, "resources": {"accelerator": "cpu"}})
    (found,) = nodes.cpus_left(config, cpus, 0, 0.5)
    assert found.verdict == verdict


def test_too_few_gpus() -> None:
    config = build({"train": {"num_workers": 8}, "resources": {"accelerator": "gpu"}})
    assert verdicts(nodes.cpus_left(config, 64, 4, 0.5)) == {"CPUs for reading": "good", "GPUs": "bad"}


def report(**faults: str) -> str:
    """What nvidia-smi writes of one GPU, as far as it is read."""
    healthy = {"errors": "0", "pending": "No", "failure": "No", "thermal": "Not Active", "soft": "Not Active",
               "used": "4 MiB", "driver": "570.1"}  # fmt: skip
    x = {**healthy, **faults}
    return f"""<?xml version="1.0" ?>
<nvidia_smi_log><driver_version>{x["driver"]}</driver_version><attached_gpus>1</attached_gpus>
<gpu id="00000000:04:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name>
<fb_memory_usage><total>81559 MiB</total><used>{x["used"]}</used></fb_memory_usage>
<ecc_errors><volatile><sram_correctable>7</sram_correctable><sram_uncorrectable_parity>0</sram_uncorrectable_parity>
<dram_uncorrectable>{x["errors"]}</dram_uncorrectable></volatile></ecc_errors>
<remapped_rows><remapped_row_pending>{x["pending"]}</remapped_row_pending>
<remapped_row_failure>{x["failure"]}</remapped_row_failure></remapped_rows>
<temperature><gpu_temp>31 C</gpu_temp></temperature><clocks_event_reasons>
<clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
<clocks_event_reason_hw_thermal_slowdown>{x["thermal"]}</clocks_event_reason_hw_thermal_slowdown>
<clocks_event_reason_sw_thermal_slowdown>{x["soft"]}</clocks_event_reason_sw_thermal_slowdown>
</clocks_event_reasons></gpu></nvidia_smi_log>"""


@pytest.mark.parametrize(
    ("faults", "verdict", "said"),
    [
        ({}, "good", "31 C, no errors, not slowed down"),
        ({"errors": "3"}, "bad", "3 uncorrectable memory errors"),
        ({"pending": "Yes"}, "bad", "wait to be remapped"),
        ({"failure": "Yes"}, "bad", "no spare rows"),
        ({"thermal": "Active"}, "bad", "slowed down (hw_thermal_slowdown)"),
        ({"soft": "Active"}, "warning", "slowed down (sw_thermal_slowdown)"),
        ({"used": "40000 MiB"}, "warning", "41.9 GB of its memory are taken"),
    ],
)
def test_gpus(faults: dict[str, str], verdict: str, said: str) -> None:
    health, driver = gpus.judge({"a": report(**faults)}, {"a": 1.0})
    assert (health.verdict, driver.verdict) == (verdict, "good")
    assert said in health.found


def test_drivers_that_differ_and_a_node_that_cannot_tell() -> None:
    found = gpus.judge({"a": report(), "b": report(driver="550.2"), "c": None, "d": None}, {"a": 1, "b": 1, "c": 8})
    assert [f.verdict for f in found] == ["good", "good", "unknown", "warning"]


def told(probe: dict[str, Any]) -> dict[str, str]:
    return verdicts(store.judge({"a": probe}, "s3://bucket/runs", "s3://bucket/latents"))


def test_storage_that_works_is_probed_and_left_as_it_was(tmp_path: Path, latents: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.at(store.PROBES).write("token", b"token")
    probe = store.probe(storage, Storage(str(latents)), "token", 2)
    assert probe["write"] > 0
    assert probe["read"] > 0
    assert [probe[part] for part in ("list and remove", "shared")] == ["", ""]
    assert storage.names() == [f"{store.PROBES}/token"]
    assert set(told({**probe, "write": 500.0, "read": 500.0}).values()) == {"good"}


def test_storage_that_cannot_be_written(tmp_path: Path, latents: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    probe = store.probe(Storage(str(tmp_path / "file")), Storage(str(latents)), "token", 1)
    assert "cannot be written" in probe["write"]
    assert told(probe)["storage: write"] == "bad"


def test_a_folder_that_another_node_does_not_see(tmp_path: Path) -> None:
    probe = store.probe(Storage(str(tmp_path)), Storage(str(tmp_path / "nothing")), "token", 1)
    found = told({**probe, "write": 30.0, "read": 5.0})
    assert found == {
        "storage: write": "warning", "storage: read": "bad", "storage: list and remove": "good",
        "storage: shared": "bad", "data set: readable": "bad",
    }  # fmt: skip


def test_a_data_set_that_is_damaged_or_does_not_fit(tmp_path: Path, latents: Path) -> None:
    model = {"latent_size": 8, "num_classes": 10}
    copy = tmp_path / "latents"
    shutil.copytree(latents, copy)
    config = {"model": model, "data": {"latents": str(copy)}, "run": {"storage": str(tmp_path)}}
    assert set(verdicts(content.data_set(build(config), 4)).values()) == {"good"}
    shard = copy / "shard-00003.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    config["model"] = {**model, "latent_size": 16}
    sample, settings = content.data_set(build(config), 1000)
    assert (sample.verdict, settings.verdict) == ("bad", "bad")
    assert "shard-00003.tar at byte" in sample.found
    assert "model.latent_size" in settings.found


def test_a_checkpoint_there_and_back(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    found = content.checkpoint(build({"run": {"storage": str(folder)}}))
    assert found.verdict == "good"
    assert not [path for path in folder.rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("no folder")
    assert content.checkpoint(build({"run": {"storage": str(tmp_path / "file")}})).verdict == "bad"


@pytest.mark.parametrize(
    ("backend", "seconds", "verdict"),
    [("nccl", 0.001, "good"), ("nccl", 0.1, "warning"), ("nccl", 1.0, "bad"), ("gloo", 0.01, "good"),
     ("gloo", 2.0, "bad")],
)  # fmt: skip
def test_a_slow_link(backend: str, seconds: float, verdict: str) -> None:
    found = traffic.judge(build({"train": {"num_workers": 8}}), backend, 8, 1, seconds)
    assert found.verdict == verdict
    assert "a step's gradients take" in found.found


def test_gradients_travel_in_fp32_from_stage_1_on() -> None:
    def seconds(stage: int, precision: str) -> float:
        config = build({"train": {"num_workers": 8, "zero_stage": stage, "precision": precision}})
        return float(traffic.judge(config, "nccl", 8, 1, 1.0).found.split()[-2])

    assert seconds(1, "bf16") == seconds(2, "bf16") == seconds(0, "fp32")
    assert seconds(0, "bf16") == pytest.approx(seconds(1, "bf16") / 2, rel=0.01)


def test_the_json_counts_verdicts() -> None:
    text = to_json([good("a", "", "x"), Finding("b", "n", "bad", "y", "z")], {"run": "r"})
    read = json.loads(text)
    assert read["verdicts"] == {"good": 1, "warning": 0, "bad": 1, "unknown": 0}
    assert read["findings"][1] == {"check": "b", "where": "n", "verdict": "bad", "found": "y", "mend": "z"}


def test_the_table_shows_every_finding_and_each_mend_once(capsys: pytest.CaptureFixture[str]) -> None:
    show([good("a", "", "[10] x"), Finding("b", "n", "bad", "y", "do z"), Finding("b", "m", "bad", "y2", "do z")])
    said = capsys.readouterr().out
    for part in ("[10] x", "y2", "b (bad): do z [n, m]"):
        assert part in said
