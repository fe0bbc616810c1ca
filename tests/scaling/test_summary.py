"""A sweep whose law is known: the summary finds it, and the page shows it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest

from dico_ray.arithmetic import parameter_count
from dico_ray.config import Config
from dico_ray.recipes import resolve
from dico_ray.scaling import figures, page, summary, trials
from dico_ray.scaling.summary import Found, Result

SCALES = ("w16", "w32", "w64")
FLOOR, AT, EXPONENT = 0.2, 1e13, 0.25


def _config(**sweep: Any) -> Config:
    return resolve("tiny-cpu", None, {"sweep": {"scales": SCALES, "lr": [1e-3, 1.6e-2], "predict": ["w128"], **sweep}})


def _best_rate(parameters: int) -> float:
    return 4e-3 * (parameters / 1e6) ** -0.3


def _result(config: Config, trial: trials.Trial, noise: float = 0.0) -> Result:
    """At the best rate the loss follows the power law of compute; elsewhere it lies above by a parabola."""
    steps = np.arange(10, 1201, 10)
    result = Result(trial, 1200, 0.0, np.empty((0, 2)))
    rng = np.random.default_rng(list(trial.key.encode()))
    off = 0.03 * math.log(trial.lr / _best_rate(parameter_count(trial.config.model))) ** 2
    loss = (
        FLOOR + 0.3 * (steps * result.flops_per_step / AT) ** -EXPONENT + off + noise * rng.standard_normal(len(steps))
    )
    curve = np.stack([steps, loss], 1)
    return Result(trial, 1200, summary.tail_mean(curve, 1200, config.sweep.tail), curve)


@pytest.fixture(scope="module")
def found() -> Found:
    config = _config()
    scales = [summary.scale_found([_result(config, t) for t in trials.planned(config, s)]) for s in SCALES]
    return summary.found(config, "loss", scales)


def test_the_optima_and_their_law_are_found(found: Found) -> None:
    assert [s.scale for s in found.scales] == list(SCALES)
    for scale in found.scales:
        assert scale.trusted is not None
        assert scale.trusted.lr == pytest.approx(_best_rate(parameter_count(scale.config.model)), rel=1e-3)
    assert found.line is not None
    assert found.line.slope == pytest.approx(-0.3, abs=1e-3)
    assert found.winner.scale == "w64"


def test_the_law_of_compute_tells_a_scale_that_was_left_out(found: Found) -> None:
    told = summary.held_out(found)
    assert told is not None
    assert told["scale"] == "w64"
    assert told["lr_ratio"] == pytest.approx(1, rel=0.01)
    assert told["loss_error"] == pytest.approx(0, abs=0.03)
    larger = summary.extrapolated(found, "w128")
    assert larger["lr"] == pytest.approx(_best_rate(larger["parameters"]), rel=0.01)
    expected = FLOOR + 0.3 * (larger["flops"] / AT) ** -EXPONENT
    assert larger["loss"] == pytest.approx(expected, rel=0.03)
    assert larger["loss_interval"][0] <= larger["loss"] <= larger["loss_interval"][1]


def test_two_scales_hold_nothing_out_and_one_has_no_line(found: Found) -> None:
    two = summary.found(found.config, "loss", found.scales[:2])
    assert summary.held_out(two) is None
    one = summary.found(found.config, "loss", found.scales[:1])
    assert one.line is None
    assert "lr" not in summary.extrapolated(one, "w128")
    assert "<svg" in page.render(one, None)


def test_where_nothing_can_be_fitted_the_best_trial_speaks() -> None:
    config = _config()
    some = [_result(config, t) for t in trials.planned(config, "w16")][:2]
    scale = summary.scale_found(some)
    assert scale.optimum is None
    assert scale.expected == (scale.best.trial.lr, scale.best.value)
    whole = summary.found(config, "loss", [scale])
    assert summary.as_json(whole, None)["winner"]["fitted"] is False
    assert "none" in page.render(whole, None)


def test_other_settings_are_compared_at_the_best_ones(found: Found) -> None:
    config = _config(space={"train.weight_decay": [0.0, 0.1]})
    results = []
    for trial in trials.planned(config, "w16"):
        result = _result(config, trial)
        worse = 0.5 if trial.config.train.weight_decay else 0.0
        results.append(Result(trial, 1200, result.value + worse, result.curve))
    scale = summary.scale_found(results)
    assert {r.trial.others for r in scale.fitted} == {(("train.weight_decay", 0.0),)}
    assert scale.expected[0] == pytest.approx(found.scales[0].expected[0])


def test_the_tail_is_the_mean_of_the_last_part() -> None:
    curve = np.stack([np.arange(1.0, 101), np.arange(1.0, 101)], 1)
    assert summary.tail_mean(curve, 100, 0.1) == pytest.approx(95.5)
    assert summary.tail_mean(curve, 50, 0.1) == pytest.approx(48)
    assert summary.tail_mean(curve[::50], 100, 0.1) == 51  # logged too rarely: the last there is


def test_json_page_and_pictures_of_noisy_diverged_and_stopped_trials() -> None:
    config = _config()
    scales = []
    for name in SCALES:
        results = [_result(config, trial, noise=0.004) for trial in trials.planned(config, name)]
        results[-1] = Result(results[-1].trial, 1200, math.inf, np.empty((0, 2)))
        half = results[0]
        results[0] = Result(half.trial, 600, half.value, half.curve[:60], complete=False)
        scales.append(summary.scale_found(results))
    whole = summary.found(config, "loss", scales)
    verified = _result(config, trials.make(config, "w64", {"train.lr": 2e-3}))
    told = json.loads(json.dumps(summary.as_json(whole, verified), allow_nan=False))
    assert told["scales"][0]["trials"][-1]["value"] is None
    assert told["verified"]["error"] == pytest.approx(told["winner"]["loss_expected"] / verified.value - 1)
    text = page.render(whole, verified)
    assert "diverged" in text
    assert text.count("<svg") == 3
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert len(figures.png(whole, verified)) < 150_000
    assert len(summary.table(whole)) == 5


def _compared() -> Found:
    """Two settings: with one the best rate is the same for all scales, with the other it falls; losses are alike."""
    config = _config(space={"train.betas": [[0.9, 0.999], [0.9, 0.99]]}, compare="train.betas")
    scales = []
    for scale in SCALES:
        for some in trials.by_kind(config, trials.planned(config, scale)):
            results = []
            for trial in some:
                count = parameter_count(trial.config.model)
                best = 3e-3 if trial.config.train.betas[1] == 0.99 else _best_rate(count)
                value = 0.3 + 0.03 * math.log(trial.lr / best) ** 2 - 1e-8 * count
                curve = np.stack([np.arange(10.0, 1201, 10), np.full(120, value)], 1)
                results.append(Result(trial, 1200, value, curve))
            scales.append(summary.scale_found(results))
    return summary.found(config, "loss", scales)


def test_each_value_of_a_compared_setting_has_optima_and_a_law_of_its_own() -> None:
    falling, flat = _compared().kinds
    assert [s.scale for s in falling.scales] == [s.scale for s in flat.scales] == list(SCALES)
    assert falling.line is not None
    assert flat.line is not None
    assert falling.line.slope == pytest.approx(-0.3, abs=1e-3)
    assert flat.line.slope == pytest.approx(0, abs=1e-3)
    sizes = [parameter_count(s.config.model) for s in falling.scales]
    assert falling.octaves == pytest.approx(0.3 * math.log2(sizes[-1] / sizes[0]), rel=1e-2)
    assert flat.octaves == pytest.approx(0, abs=1e-2)


def test_the_report_shows_what_was_compared_side_by_side() -> None:
    whole = _compared()
    told = json.loads(json.dumps(summary.as_json(whole, None), allow_nan=False))
    assert [len(kind["scales"]) for kind in told["kinds"]] == [3, 3]
    assert told["scales"] == next(k["scales"] for k in told["kinds"] if k["kind"] == told["winner"]["kind"])
    lines = summary.table(whole)
    assert len(lines) == 1 + 6 + 2 + 1
    assert "w16 (0.9, 0.99)" in lines[4] or "w16 [0.9, 0.99]" in lines[4]
    text = page.render(whole, None)
    assert text.count("octaves apart. The band") == 2
    for kind in whole.kinds:
        assert text.count(f"loss by learning rate, {kind.kind}") == 1
    assert len(figures.png(whole, None)) < 200_000


def test_without_a_comparison_nothing_is_told_of_one(found: Found) -> None:
    assert found.every == (found,)
    assert found.kind == ""
    text = page.render(found, None)
    assert "swept for itself" not in text
    assert text.count("octaves apart") == 1
