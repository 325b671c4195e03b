"""Runs jobs in the processes of torchrun: `torchrun --nproc-per-node 2 worker.py FOLDER JOBS_AS_JSON`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    import torch.distributed as dist
    from distributed_kit import leave
    from safetensors.torch import save_file
    from shapes.hosts import run

    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, job in jobs.items():
        checkpoint = folder / f"checkpoint_{name}"
        checkpoint.mkdir(exist_ok=True)
        try:
            result = run(**job, processes=int(os.environ["WORLD_SIZE"]), folder=checkpoint)
        except Exception:
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
            continue
        save_file({key: value.contiguous() for key, value in result.items()}, folder / f"{name}_{dist.get_rank()}")
    leave()
