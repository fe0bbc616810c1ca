"""`make demo`: the main job on handwritten digits, by the verbs a user would type, one after the other.

Prints each command before it runs it. Every verb finds out by itself what is already done.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from dico_ray.demo.digits import digits_complete, write_digits

_SETTINGS = "--recipe tiny-cpu --run.storage {0} --run.name demo"
_STEPS = (
    "dico-ray encode {s} --encode.images {0}/digits --data.latents {0}/digits-latents",
    "dico-ray train {s} --data.latents {0}/digits-latents",
    "dico-ray sample {s}",
    "dico-ray evaluate {s} --evaluate.reference {0}/digits",
    "dico-ray report {s}",
)


def main() -> int:
    """Exit code 0 if every verb succeeded, otherwise the failing verb's."""
    parser = argparse.ArgumentParser(prog="python -m dico_ray.demo", description="The main job on digits.")
    parser.add_argument("--storage", default="runs", help="folder for the demo's data and run [runs]")
    storage = parser.parse_args().storage
    began = time.monotonic()
    digits = Path(storage) / "digits"
    if not digits_complete(digits):
        print(f"\n# 5,000 handwritten digits -> {digits}")
        write_digits(digits)
    for step in _STEPS:
        command = step.format(storage, s=_SETTINGS.format(storage))
        print(f"\n$ {command}", flush=True)
        words = [sys.executable, "-m", "dico_ray.cli", *shlex.split(command)[1:]]
        code = subprocess.run(words, check=False).returncode
        if code:
            return code
    print(f"\nDone in {time.monotonic() - began:.0f} s. Open {Path(storage).resolve()}/demo/report.html")
    for name in ("samples/grid.png", "evaluation.json", "metrics.jsonl", "config.yaml", "checkpoints"):
        print(f"  {Path(storage).resolve()}/demo/{name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
