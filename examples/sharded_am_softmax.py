"""AM-softmax with its class vectors on several ranks: train, save, go on with another number of ranks, search.

::

    torchrun --nproc-per-node 4 -m examples.sharded_am_softmax
    torchrun --nproc-per-node 2 -m examples.sharded_am_softmax --steps 600  # goes on where the four stopped

Each rank holds the words' vectors and a part of the class vectors, and sees a part of each batch. NCCL where every
rank has a GPU, else gloo. The data are made here: sentences in 77 groups, as in BANKING77, each with its own few
words among common ones.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import trange

from lossbook.am_softmax import retrieval_accuracy
from lossbook.distributed import ShardedCosineClassifier, sharded_am_softmax_loss

WORDS, LENGTH = 6000, 12  # in the language, in a sentence


def sentences(groups: int, each: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``each`` sentences of each group as word numbers ``(N, LENGTH)``, and their groups ``(N,)``.

    Half of the words are common ones, the others come from ten of the group's own, which other groups share.
    """
    own = torch.randint(WORDS, (groups, 10), generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed + 1)
    group = torch.arange(groups).repeat_interleave(each)
    topical = own[group].gather(1, torch.randint(10, (len(group), LENGTH), generator=g))
    common = (WORDS * torch.rand(len(group), LENGTH, generator=g) ** 3).long()  # a few of them very often
    return torch.where(torch.rand(len(group), LENGTH, generator=g) < 0.5, common, topical), group


def model_of(groups: int, width: int, device: str) -> nn.ModuleDict:
    """Words' vectors, the same on every rank, and this rank's class vectors."""
    torch.manual_seed(0)
    encoder = nn.EmbeddingBag(WORDS, width).to(device)
    return nn.ModuleDict({"encoder": encoder, "head": ShardedCosineClassifier(width, groups, device=device)})


def optimizer_of(model: nn.ModuleDict) -> torch.optim.Optimizer:
    """Adam; whole and sharded parameters in groups of their own."""
    return torch.optim.Adam([{"params": part.parameters()} for part in model.values()], lr=0.03)


# ------------------------------------------------------------------------------------- what the page Recipes shows


def gathered(mine):
    """The rows of all ranks; the gradient goes to this one's own."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine.detach())
    parts[dist.get_rank()] = mine
    return torch.cat(parts)


def step(model, optimizer, x, y, **options):
    """One step, from this rank's part of the batch."""
    z, weight = gathered(model["encoder"](x)), model["head"].weight
    loss = sharded_am_softmax_loss(z, weight, gathered(y), **options)
    optimizer.zero_grad()
    loss.backward()
    for p in model["encoder"].parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)  # each rank has the gradient of its own rows
    optimizer.step()
    return loss.detach()


def save(model, optimizer, done, folder):
    """Every rank writes its shards."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "done": done}, checkpoint_id=folder)


def resume(model, optimizer, done, folder):
    """Every rank reads its shards, however many wrote them."""
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state, "done": done}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


# -----------------------------------------------------------------------------------------------------------------


def search_accuracy(model: nn.ModuleDict, data: tuple[Tensor, Tensor]) -> float:
    """How often the sentence nearest to another one is of its group, in percent."""
    with torch.no_grad():
        return 100 * float(retrieval_accuracy(model["encoder"](data[0]), data[1], k=1)[1])


def main(argv: Sequence[str] | None = None) -> float:
    """Train up to ``--steps``, from the checkpoint where there is one; returns the search accuracy."""
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node 4 -m examples.sharded_am_softmax")
    parser.add_argument("--groups", type=int, default=77, help="classes (77)")
    parser.add_argument(
        "--each", type=int, default=20, help="sentences of a class for training, and for the search (20)"
    )
    parser.add_argument("--steps", type=int, default=300, help="steps in all, with those of the checkpoint (300)")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step on all ranks (64)")
    parser.add_argument("--width", type=int, default=32, help="numbers of an embedding (32)")
    parser.add_argument("--sample", type=float, help="share of the class vectors that takes part in a step (all)")
    parser.add_argument(
        "--folder", type=Path, default=Path("checkpoints/sharded_am_softmax"), help="of the checkpoints"
    )
    options = parser.parse_args(argv)

    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = "cuda" if gpu else "cpu"
    begun = not dist.is_initialized()
    if begun:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if options.batch % ranks:
        parser.error(f"--batch must be a multiple of the {ranks} ranks")

    x, y = (part.to(device) for part in sentences(options.groups, options.each))
    unseen = sentences(options.groups, options.each, seed=1)
    test = unseen[0].to(device), unseen[1].to(device)
    model = model_of(options.groups, options.width, device)
    optimizer, done = optimizer_of(model), torch.tensor(0)
    saved = [int(path.name) for path in options.folder.glob("[0-9]*")]
    if saved:
        resume(model, optimizer, done, options.folder / str(max(saved)))
    before, start = search_accuracy(model, test), int(done)
    bar = trange(start, options.steps, initial=start, total=options.steps, disable=rank > 0, desc=f"{ranks} ranks")
    for number in bar:
        # the batch does not depend on the number of ranks
        rows = torch.randint(len(x), (options.batch,), generator=torch.Generator().manual_seed(number))
        rows = rows[rank::ranks].to(device)
        draw = torch.Generator().manual_seed(number)
        loss = step(model, optimizer, x[rows], y[rows], sample=options.sample, generator=draw)
        done += 1
        if number % 20 == 0:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    if int(done) > start:
        save(model, optimizer, done, options.folder / str(int(done)))
    after = search_accuracy(model, test)
    if rank == 0:
        print(f"search accuracy {before:.1f} % after {start} steps, {after:.1f} % after {int(done)}")
    if begun:
        dist.destroy_process_group()
    return after


if __name__ == "__main__":
    main()
