"""How much is measured: everything, a quick look, or next to nothing."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers are of tasks, unless they say of what; times are in seconds."""

    #: Tasks that do nothing, tasks that write a row, tasks that sleep.
    nothing: int = 50_000
    write: int = 3_000
    wait: int = 4_000
    #: Time after which a worker has done enough.
    box: float = 4.0
    #: The same for other queues, and tasks for those that turn out to be slow.
    peers_box: float = 1.5
    slow: int = 2_000
    #: Requests, and tasks that are enqueued at once.
    requests: int = 1_000
    many: int = 100_000
    #: Times that a bare statement is repeated for.
    bare: float = 1.5
    #: Commits whose tasks are waited for one by one, and those at a steady rate.
    commits: int = 100
    steady: int = 400
    #: Tasks due later, within how long.
    due: int = 300
    due_within: float = 5.0
    #: Waiting tasks, from the fewest on; done ones; and those scheduled for later.
    waiting: tuple[int, ...] = (1_000, 1_000_000)
    done: tuple[int, ...] = (5_000_000,)
    later: int = 1_000_000
    #: Tasks that are done at such a depth, and how often.
    depth: int = 15_000
    repeats: int = 3
    #: Tasks done while a snapshot is held, each of which leaves two dead rows; and for how long.
    held: int = 150_000
    held_box: float = 20.0
    peers_held: int = 40_000
    peers_held_box: float = 3.5
    #: Workers that are idle, and for how long, and how long NOTIFY is sent beside them. They settle
    #: first: a backend with nothing to do may tell what it did before after ten seconds only. The
    #: rarest of what they do comes every thirty.
    idle: int = 50
    settled: float = 11.0
    idle_for: float = 30.0
    notify_for: float = 5.0
    #: Channels, and the workers that share them.
    channels: int = 64
    workers: int = 10
    shared: int = 40_000
    #: Tasks that one worker does while its memory is watched.
    memory: int = 1_000_000
    memory_box: float = 120.0
    #: Times that the package is imported.
    imports: int = 7


FULL = Sizes()
QUICK = Sizes(
    nothing=20_000,
    write=2_000,
    wait=1_500,
    box=3.0,
    peers_box=1.5,
    slow=1_000,
    requests=400,
    many=50_000,
    bare=1.0,
    commits=100,
    steady=200,
    due=100,
    due_within=3.0,
    waiting=(1_000, 200_000),
    done=(500_000,),
    later=200_000,
    depth=10_000,
    repeats=2,
    held=40_000,
    held_box=8.0,
    peers_held=20_000,
    peers_held_box=5.0,
    idle=20,
    idle_for=30.0,
    notify_for=2.0,
    workers=4,
    shared=20_000,
    memory=100_000,
    memory_box=20.0,
    imports=3,
)
#: To see that everything runs; the figures say nothing.
TINY = Sizes(
    nothing=300,
    write=50,
    wait=50,
    box=2.0,
    peers_box=2.0,
    slow=50,
    requests=5,
    many=100,
    bare=0.1,
    commits=3,
    steady=10,
    due=5,
    due_within=0.5,
    waiting=(10, 500),
    done=(1_000,),
    later=500,
    depth=100,
    repeats=1,
    held=300,
    held_box=2.0,
    peers_held=300,
    peers_held_box=2.0,
    idle=2,
    settled=0.0,
    idle_for=0.5,
    notify_for=0.1,
    channels=8,
    workers=2,
    shared=300,
    memory=600,
    memory_box=5.0,
    imports=1,
)
