"""Collectives of processes on one machine, waited for at once: through memory that they share against over the network, in turns.

    python tests/bench/exchange.py --members 2 --rounds 5

The network is Bagualu's own exchange (memory taken away) and torch's collective. Before every call the operands are pushed out of
the caches, as they would be between layers. Prints a table of the lower quartiles (a call that another program disturbs takes a
time slice of the scheduler longer), and JSON with the machine.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from contest.environment import machine
from contest.report import table_of

from bagualu.comm.gloo import GlooTransport
from bagualu.comm.group import Communicator, connect
from bagualu.comm.world import World
from bagualu.trainer.process.environment import pin, variables
from bagualu.trainer.recipe.config import LaunchConfig

KIBIBYTES = (16, 64, 128, 256, 512, 1024, 2048, 4096)
WAYS = ("memory", "network", "torch")
_CALLS = 10
"""One after the other in a turn."""
_WIDTH = 512
"""Elements of a row that goes to the expert of another member."""
_CACHES = 2**23
"""Elements of float32 that are more than the caches of a core hold."""


def calls(c: Communicator, kibibytes: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Returns what makes each call to time, by the collective's name and the way that it takes (WAYS). Each member gives
    `kibibytes` KiB of bfloat16."""
    x = torch.zeros(kibibytes * 512, dtype=torch.bfloat16)
    whole, part = x.new_empty(c.size * x.numel()), x.new_empty(x.numel() // c.size)
    rows = x.view(-1, _WIDTH)
    arrived = torch.empty_like(rows)
    ours: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: c.world.all_reduce(x),
        "all_gather": lambda: c.world.all_gather(whole, x),
        "reduce_scatter": lambda: c.world.reduce_scatter(part, x),
        "all_to_all": lambda: c.world.all_to_all(arrived, rows),
    }
    theirs: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: dist.all_gather_single(whole, x),
        "reduce_scatter": lambda: dist.reduce_scatter_single(part, x),
        "all_to_all": lambda: dist.all_to_all_single(arrived, rows),
    }
    transport = c.world.transport
    assert isinstance(transport, GlooTransport)
    slots = transport.slots

    def over_network(call: Callable[[], Any]) -> None:
        transport.slots = None
        call()
        transport.slots = slots

    return {op: {"memory": ours[op], "network": lambda call=ours[op]: over_network(call), "torch": theirs[op]} for op in ours}


def member(rank: int, size: int, meeting: str, rounds: int, answers: Any) -> None:
    torch.set_num_threads(1)
    pin(LaunchConfig(), rank, size)
    c = connect("gloo", World(rank, size, rank, meeting))
    caches, found = torch.zeros(_CACHES), []
    for kibibytes in KIBIBYTES:
        for op, ways in calls(c, kibibytes).items():
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for way in WAYS * rounds:
                for _ in range(_CALLS):
                    caches.add_(1)
                    c.world.barrier()
                    started = time.perf_counter()
                    ways[way]()
                    seconds[way].append(time.perf_counter() - started)
            found.append({"collective": op, "KiB": kibibytes} | {way: statistics.quantiles(seconds[way])[0] for way in WAYS})
    c.close()
    if rank == 0:
        answers.put(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help=f"turns of each way, of {_CALLS} calls")
    options = parser.parse_args()
    os.environ |= variables(LaunchConfig(), options.members)  # the members' allocator, as the launcher sets it
    context = processes.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="bagualu-bench-") as folder:
        arguments = (options.members, (Path(folder) / "meeting").as_uri(), options.rounds, answers)
        processes.spawn(member, arguments, nprocs=options.members)
    found = answers.get()
    print(table_of([
        {"collective": row["collective"], "KiB": row["KiB"]}
        | {f"{way} ms": f"{row[way] * 1e3:.2f}" for way in WAYS}
        | {"network / memory": f"{row['network'] / row['memory']:.2f}"}
        for row in sorted(found, key=lambda row: row["collective"])
    ]))  # fmt: skip
    print(json.dumps({"machine": machine(), "members": options.members, "seconds": found}))


if __name__ == "__main__":
    main()
