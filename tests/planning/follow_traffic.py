"""One rank of `torchrun`: what the engine sends in a step, by DeepSpeed's own log, and what state it then holds.

    torchrun --nproc-per-node N follow_traffic.py OUTPUT MICRO_BATCHES '[{"train": {...}, ...}, ...]'

Writes OUTPUT: for each case's settings, bytes of the step's tensors by kind of collective, and of all tensors that
are held after it, and still when the next of a bench's variants begins.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.comm.comm import comms_logger

from dico_ray.bench.network import begin
from dico_ray.models import create_model
from dico_ray.settings import build
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine


def follow(settings: dict[str, Any], micro_batches: int) -> dict[str, Any]:
    """The second step's: the first one may set things up."""
    before, config = _held(), build(settings)
    sizes = config.model.architecture
    model = create_model("DiCo-tiny", hidden_size=sizes.hidden_size, depths=sizes.depths, num_classes=10)
    engine = Engine(model, config.train, torch.device("cpu"))
    ema = EMA(engine, config.train.ema_decay)
    _step(engine, micro_batches)
    comms_logger.comms_dict.clear()
    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False)
    _step(engine, micro_batches)
    deepspeed.comm.configure(enabled=False)
    held = _held() - before
    engine.close()
    del engine, ema, model
    begin(torch.device("cpu"))
    left = _bytes() - before
    return {
        "sent": {
            name: sum(int(size) * int(entry[0]) for size, entry in sizes.items())
            for name, sizes in comms_logger.comms_dict.items()
        },
        "held": held,
        "left": left,
    }


def _held() -> int:
    gc.collect()
    return _bytes()


def _bytes() -> int:
    """Of every tensor's storage, once, those included that a search for garbage would let go."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout == torch.strided and thing.device.type != "meta":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def _step(engine: Engine, micro_batches: int) -> None:
    x, t, y = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    for _ in range(micro_batches):
        engine.backward(engine(x, t, y).float().square().mean())


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = [follow(case, int(sys.argv[2])) for case in json.loads(sys.argv[3])]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
