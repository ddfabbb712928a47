"""torchrun --nproc-per-node 2 docs/examples/trainers/torchrun_ddp.py"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from optimizers import SOAA

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 3))
x = torch.randn(64, 4)
y = (x @ torch.randn(4, 3)).argmax(1)
optimizer = SOAA(model.parameters(), lr=0.05, total_steps=20)
for _ in range(20):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x[rank::world]), y[rank::world])
    optimizer.backward(loss)
    optimizer.step()  # the loss is averaged over ranks before the ratio

seen = [torch.zeros(()) for _ in range(world)]
dist.all_gather(seen, optimizer.step_info.radius.reshape(()))
if rank == 0:
    same = all(torch.equal(r, seen[0]) for r in seen)
    print(f"loss {float(optimizer.step_info.loss):.4f}, the same radius on all ranks: {same}")
dist.barrier()  # nobody leaves while another still reads
dist.destroy_process_group()
# What DDP still holds keeps gloo's threads alive, and one that lets go of a tensor while Python shuts down aborts
# the process ("terminate called without an active exception"): leave without a shutdown.
sys.stdout.flush()
os._exit(0)
