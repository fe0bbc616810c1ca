"""What a sweep tries: grids, draws, names, stages, widening, and the mistakes that are told before it starts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dico_ray.config import Config, ConfigError
from dico_ray.recipes import resolve
from dico_ray.scaling import trials
from dico_ray.settings import build


def _config(train: dict[str, Any] | None = None, **sweep: Any) -> Config:
    return resolve(
        "tiny-cpu", None, {"run": {"name": "s"}, "train": train or {}, "sweep": {"lr": [1e-3, 1.6e-2], **sweep}}
    )


def test_a_grid_is_even_in_the_logarithm_and_crossed_with_the_other_settings() -> None:
    config = _config(space={"train.weight_decay": [0.0, 0.1], "train.betas": [[0.9, 0.999]]})
    found = trials.planned(config, "x0.5")
    assert [t.lr for t in found] == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2] * 2
    assert {t.config.train.weight_decay for t in found} == {0.0, 0.1}
    assert len({t.key for t in found}) == 10
    assert all(t.config.train.lr == t.lr and t.config.model.hidden_size == 24 for t in found)
    assert all(t.config.run.folder.endswith(f"/runs/s/trials/{t.key}") for t in found)


def test_draws_are_repeatable_and_within_their_ranges() -> None:
    space = {"train.weight_decay": {"low": 1e-3, "high": 0.1, "log": True}, "train.grad_clip": [0, 1.0]}
    config = _config(search="random", points=20, space=space)
    found, again = trials.planned(config, "x1"), trials.planned(config, "x1")
    assert [t.key for t in found] == [t.key for t in again]
    assert all(1e-3 <= t.lr <= 1.6e-2 and 1e-3 <= t.config.train.weight_decay <= 0.1 for t in found)
    assert {t.config.train.grad_clip for t in found} == {0, 1.0}
    assert {t.lr for t in trials.planned(config, "x0.5")} != {t.lr for t in found}


def test_a_trials_name_is_its_settings_not_its_length_or_place() -> None:
    one = trials.planned(_config(), "x1")[0]
    longer = trials.planned(_config({"steps": 5000, "checkpoint_every": 7, "num_workers": 1}), "x1")[0]
    other = trials.planned(_config({"label_drop": 0.2}), "x1")[0]
    assert one.key == longer.key != other.key
    assert one.to(60).train.steps == 60
    assert trials.planned(_config(budget="flops"), "x1")[0].key == one.key
    assert trials.make(_config(), "x1", {"train.lr": 1e15}).key.startswith("x1-lr1e15-")


def test_what_is_compared_gets_the_same_rates_and_is_kept_apart() -> None:
    space = {"train.parametrization": ["standard", "mup"], "train.grad_clip": [0, 1.0]}
    for search, rates in (("grid", 10), ("random", 5)):
        config = _config({"base_width": 16}, search=search, points=5, space=space, compare="train.parametrization")
        standard, mup = trials.by_kind(config, trials.planned(config, "w32"))
        assert {t.config.train.parametrization for t in standard} == {"standard"}
        assert {t.config.train.parametrization for t in mup} == {"mup"}
        assert [t.lr for t in standard] == [t.lr for t in mup]
        assert [t.config.train.grad_clip for t in standard] == [t.config.train.grad_clip for t in mup]
        assert len(standard) == rates
        assert len({t.key for t in (*standard, *mup)}) == 2 * rates
        assert trials.title(config, mup[0]) == "w32 mup"
    alone = trials.planned(_config(), "w32")
    assert trials.by_kind(_config(), alone) == [alone]
    assert trials.title(_config(), alone[0]) == "w32"


def test_the_path_that_computes_a_trial_is_not_in_its_name() -> None:
    keys = {trials.planned(_config().model_copy(update={"model": _config().model.model_copy(update={"kernels": k})}),
                           "x1")[0].key for k in ("auto", "torch")}  # fmt: skip
    assert len(keys) == 1


def test_names_of_trials_know_the_base_width_where_it_is_used() -> None:
    plain, same = (trials.planned(_config({"base_width": width}), "x1")[0] for width in (None, 16))
    mup, other = (
        trials.planned(_config({"parametrization": "mup", "base_width": width}), "x1")[0] for width in (16, 32)
    )
    assert plain.key == same.key
    assert len({plain.key, mup.key, other.key}) == 3


def test_stages_end_at_the_full_length() -> None:
    assert trials.rung_steps(_config()) == [1200]
    assert trials.rung_steps(_config(rungs=3)) == [300, 600, 1200]
    assert trials.rung_steps(_config(rungs=3, eta=3)) == [134, 400, 1200]


def test_the_better_part_goes_on_but_never_fewer_than_three() -> None:
    some = trials.planned(_config(points=9), "x1")
    values = {t.key: float(i) for i, t in enumerate(reversed(some))}
    kept = trials.survivors(some, values, 2)
    assert [t.lr for t in kept] == sorted((t.lr for t in some), reverse=True)[:5]
    assert len(trials.survivors(some, values, 9)) == 3
    gone = dict.fromkeys(values, math.inf) | {some[4].key: 1.0}
    assert trials.survivors(some, gone, 2) == [some[4]]


def test_a_best_rate_at_an_end_asks_for_one_more_beyond_it() -> None:
    config = _config()
    some = trials.planned(config, "x1")
    rising, falling = ({t.key: sign * t.lr for t in some} for sign in (1, -1))
    inside = {t.key: abs(math.log(t.lr / 4e-3)) for t in some}
    assert trials.widened(config, some, inside) is None
    low, high = trials.widened(config, some, rising), trials.widened(config, some, falling)
    assert low is not None
    assert high is not None
    assert (low.lr, high.lr) == (5e-4, 3.2e-2)
    assert trials.widened(config, [*some, high], falling | {high.key: 0.0}) is None
    diverged = falling | {some[-1].key: math.inf}
    assert trials.widened(config, some, diverged) is None  # the next one below is inside what was tried
    assert trials.widened(config, some, dict.fromkeys(inside, math.inf)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": {"train.weight_decai": [1]}}, r"weight_decai is not a setting; did you mean train\.weight_decay"),
        ({"space": {"train.weight_decay": []}}, r"train\.weight_decay: \[\] is empty"),
        ({"space": {"train.weight_decay": 3}}, r"train\.weight_decay: 3 is empty or no list"),
        ({"space": {"train.weight_decay": [-1]}}, r"train\.weight_decay: -1"),
        ({"space": {"train.lr": [1]}}, r"swept by sweep\.lr"),
        ({"space": {"train.steps": [1]}}, r"train\.steps cannot be varied"),
        ({"space": {"sample.steps": [1]}}, r"sample\.steps cannot be varied"),
        ({"space": {"train.global_batch": [96, 192]}}, r"train\.global_batch cannot be varied"),
        ({"space": {"train.zero_stage": [0, 1]}}, r"train\.zero_stage cannot be varied"),
        ({"space": {"train.weight_decay": {"low": 0, "high": 1}}}, r"a grid needs a list"),
        ({"search": "random", "space": {"train.weight_decay": {"low": 1, "high": 0}}}, r"is no range"),
        ({"search": "random", "space": {"train.weight_decay": {"low": 0, "high": 1, "log": True}}}, r"is no range"),
        ({"search": "random", "space": {"train.weight_decay": {"low": 0, "hihg": 1}}}, r"is no range"),
        ({"space": {"train.parametrization": ["mup"]}}, r"train\.base_width: unset"),
        ({"rungs": 6}, r"sweep\.rungs: the first stage of x1 ends at step 38, within train\.warmup_steps = 50"),
    ],
)  # fmt: skip
def test_what_cannot_be_varied_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trials.check_space(_config(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": []}, r"sweep\.scales: \[\] is empty"),
        ({"scales": ["x1", "x1"]}, r"x1 stands there twice"),
        ({"lr": [1e-3, 1e-3]}, r"sweep\.lr: .* holds no range"),
        ({"search": "optuna", "rungs": 2}, r"sweep\.rungs: 2 cannot go with sweep\.search optuna"),
        ({"points": 2}, r"sweep\.points"),
        ({"compare": "train.betas"}, r"sweep\.compare: train\.betas needs two values or more in sweep\.space"),
        ({"compare": "train.grad_clip", "space": {"train.grad_clip": [1]}}, r"sweep\.compare: .* needs two values"),
        (
            {"compare": "train.grad_clip", "space": {"train.grad_clip": [0, 1]}, "search": "optuna"},
            r"sweep\.compare: train\.grad_clip cannot go with sweep\.search optuna",
        ),
    ],
)
def test_an_empty_or_contradictory_sweep_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"sweep": settings})
