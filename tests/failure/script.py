"""A user's script, started once: the Trainer starts the other process itself.

usage: script.py PLACE RANK HOW [WORKERS]
"""

import sys
import time
from pathlib import Path

import torch
from failure import faults
from failure.faults import Fault

if __name__ == "__main__":
    torch.set_num_threads(1)
    place, rank, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    workers = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    fault = Fault(place, rank, 1, how, clock=f"{Path.cwd()}/clock")
    trainer = faults.make_trainer(2)
    torch.manual_seed(1)
    other = trainer.global_rank != rank
    model = faults.Model(Fault("on_train_batch_start", 1 - rank, how="sleep") if other and how == "both" else fault)
    options = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    trainer.fit(model, faults.loader(**options), faults.loader())
    if place == "leave" and trainer.global_rank == rank:
        sys.exit(0)
    if place == "after" and trainer.global_rank == rank:
        time.sleep(3)  # the other process has long ended
    if place == "leave":
        trainer.validate(model, faults.loader(), verbose=False)
    print("done", trainer.global_rank, flush=True)
