"""torchrun --nproc-per-node 2 --max-restarts 1 docs/examples/trainers/torchrun_restart.py FOLDER [RANK STEP]

Trains with checkpoints, and goes on from the last one when torchrun restarts the ranks. With RANK and STEP that rank is
killed there, in its first life.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from optimizers import SOAA

folder = Path(sys.argv[1])
die = tuple(map(int, sys.argv[2:4])) if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" else ()
total = 12

# torchrun's agent keeps one store through restarts (pytorch#135712): under the same keys a rank may read the address
# of one that died, and be refused. On several nodes, whose agents count restarts by themselves, set
# TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in place of the prefix.
store, rank, world = next(dist.rendezvous("env://"))
life = dist.PrefixStore(f"life-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
dist.init_process_group("gloo", store=life, rank=rank, world_size=world)
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
optimizer = SOAA(module.parameters(), lr=0.05, total_steps=total)

done = 0
if (folder / "last.pt").exists():
    saved = torch.load(folder / "last.pt", weights_only=True)
    module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    done = saved["done"]
    if rank == 0:
        print(f"resumed after step {done}")
model = DistributedDataParallel(module)

for step in range(done, total):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, 4, generator=generator)
    y = x[:, :3].argmax(1)
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x[rank::world]), y[rank::world])
    optimizer.backward(loss)
    if (rank, step) == die:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
    if rank == 0 and (step + 1) % 3 == 0:  # all ranks hold the same state
        state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}
        torch.save(state, folder / "unfinished.pt")
        os.replace(folder / "unfinished.pt", folder / "last.pt")  # never half a checkpoint

if rank == 0:
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, folder / "end.pt")
    print(f"loss {float(optimizer.step_info.loss):.4f}")
dist.barrier()
dist.destroy_process_group()
# What DDP still holds keeps gloo's threads alive, and one that lets go of a tensor while Python shuts down aborts
# the process ("terminate called without an active exception"): leave without a shutdown.
sys.stdout.flush()
os._exit(0)
