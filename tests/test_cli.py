from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from dico_ray import cli
from dico_ray.settings import SECTION_NAMES, fields

# Runs command lines in one fresh interpreter; tells of each what was printed and whether heavy packages came in.
_PROBE = """
import contextlib, io, json, sys
from dico_ray.cli import main
told = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    heavy = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "ray", "deepspeed", "diffusers"})
    told.append([code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(told))
"""

WRONG = {
    "unknown verb": (["trian"], "'trian' is not a verb"),
    "unknown key": (["train", "--train.lrr", "3"], "did you mean train.lr?"),
    "unknown key=value": (["train", "--trian.lr=3"], "did you mean train.lr?"),
    "bad value": (["train", "--train.lr", "fast"], "train.lr: 'fast'"),
    "bad list": (["plan", "--train.betas", "[0.9"], "write a list as [1,2]"),
    "not dividing": (["train", "--train.num_workers", "3"], "train.num_workers = 3"),
    "unknown model": (["plan", "--model.name", "DiCo-Q"], "take one of DiCo-S"),
    "unknown recipe": (["plan", "--recipe", "dico-x"], "did you mean dico-x"),
    "missing file": (["plan", "--config", "/no/such.yaml"], "name a YAML file that exists"),
    "no value": (["plan", "--train.lr"], "--train.lr"),
    "a stray word": (["plan", "now"], "'now' stands alone"),
    "an abbreviation": (["plan", "--train.weight", "0"], "train.weight"),
    "no name": (["plan", "--run.name", "a b"], "run.name"),
}


class Told(NamedTuple):
    code: int
    out: str
    err: str
    heavy: list[str]


@pytest.fixture(scope="module")
def light() -> dict[str, Told]:
    """What each wrong command line and each help says, in an interpreter that has imported nothing else."""
    lines = {name: words for name, (words, _) in WRONG.items()}
    lines |= {f"help {verb}": [*verb.split(), "--help"] for verb in cli.VERBS}
    lines |= {"help": ["--help"], "nothing": []}
    command = [sys.executable, "-c", _PROBE, json.dumps(list(lines.values()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return {name: Told(*told) for name, told in zip(lines, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_exit_with_2_and_one_line(light: dict[str, Told], name: str) -> None:
    told = light[name]
    assert told.code == 2
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith("dico-ray: ")
    assert WRONG[name][1] in told.err


@pytest.mark.parametrize("name", ["unknown verb", "unknown key", "missing file"])
def test_the_command_itself(name: str) -> None:
    words, says = WRONG[name]
    done = subprocess.run(
        [sys.executable, "-m", "dico_ray.cli", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


def test_help_and_mistakes_import_nothing_heavy(light: dict[str, Told]) -> None:
    assert {name: told.heavy for name, told in light.items() if told.heavy} == {}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_explains_every_setting_of_the_verb(light: dict[str, Told], verb: str) -> None:
    told = light[f"help {verb}"]
    assert (told.code, told.err) == (0, "")
    text = " ".join(told.out.split())
    for section in SECTION_NAMES:
        for field in fields(section):
            mentioned = f"--{field.path} " in text
            assert mentioned == (section in cli.VERBS[verb][2]), field.path
            if mentioned:
                assert " ".join(field.doc.split()[:3]) in text, field.path
    assert "--recipe" in text
    assert "--config" in text


def test_overall_help_lists_the_verbs(light: dict[str, Told]) -> None:
    assert light["help"].code == 0
    assert all(f"  {verb} " in light["help"].out for verb in cli.VERBS)
    assert (light["nothing"].code, light["nothing"].out) == (2, light["help"].out)


def test_values_keep_their_kinds() -> None:
    words = "--train.lr 2e-4 --train.flip false --model.depths [1,2,3,2,1] --train.betas (0.8,0.9)"
    words += " --sample.guidance_channels 3 --sample.guidance_interval [100,900] --train.micro_batch 8"
    config, own = cli.parse("train", [str(word) for word in words.split()])
    assert (config.train.lr, config.train.flip, config.model.depths) == (2e-4, False, (1, 2, 3, 2, 1))
    assert (config.train.betas, config.sample.guidance_channels) == ((0.8, 0.9), "3")
    assert (config.sample.guidance_interval, config.train.micro_batch) == ((100, 900), 8)
    assert own == {"verbose": False}
    assert cli.parse("plan", ["--verbose", "--train.lr=0.5"])[0].train.lr == 0.5


def test_null_takes_a_setting_back(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: {micro_batch: 8}\nmodel: {hidden_size: 12}\n")
    words = ["--config", str(file)]
    assert cli.parse("plan", words)[0].train.micro_batch == 8
    config = cli.parse("plan", [*words, "--train.micro_batch", "null", "--model.hidden_size", "None"])[0]
    assert (config.train.micro_batch, config.model.hidden_size) == (None, None)


def test_every_verb_takes_the_settings_of_all() -> None:
    for verb in cli.VERBS:
        needed = [option.name for option in cli.VERBS[verb].options if option.default is None]
        given = [word for name in needed for word in ([name, "0.1"] if name.startswith("--") else ["x"])]
        assert cli.parse(verb, [*given, "--sample.steps", "7"])[0].sample.steps == 7


def test_command_line_over_file_over_recipe(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("recipe: dico-h-256\ntrain: {lr: 3.0e-4, warmup_steps: 9}\n")
    config, _ = cli.parse("plan", ["--config", str(file), "--train.lr", "5e-4"])
    assert (config.train.lr, config.train.warmup_steps, config.train.global_batch) == (5e-4, 9, 1024)
    assert cli.parse("plan", ["--config", str(file), "--recipe", "dico-s-256"])[0].model.name == "DiCo-S"


def test_a_verb_that_works_returns_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--recipe", "tiny-cpu"]) == 0
    assert "DiCo-tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        lambda folder: ["train", "--data.latents", folder],
        lambda folder: ["report", "--run.storage", folder],
        lambda folder: ["sample", "--run.storage", folder],
        lambda folder: ["ema", "--sigma", "0.1", "--run.storage", folder],
        lambda folder: ["ema", "--sigma", "0.3", "--run.storage", folder],
        lambda folder: ["ema", "--run.storage", folder],
        lambda folder: ["encode", "--encode.images", folder],
        lambda folder: ["encode"],
        lambda folder: ["evaluate", "--evaluate.images", folder],
    ],
    ids=["train", "report", "sample", "ema", "ema wide", "ema unset", "encode", "encode unset", "evaluate"],
)
def test_doors_refuse_what_is_missing_before_anything_starts(
    words: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    with pytest.raises(SystemExit) as stop:
        cli.main(words(str(tmp_path)))
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert not ray.is_initialized()
    assert list(tmp_path.iterdir()) == []
