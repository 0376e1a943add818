"""What faults do to a queue under load: what is lost, what is doubled, how soon it is itself again.

    python -m tests.chaos --help

Each scenario has a PostgreSQL of its own, as durable as in production. A shop sells: it commits a
sale and its task together, and notes what it was told. Workers ship each sale, which is an effect
in the database; for every fourth one they post a letter instead, which is an effect outside. Tasks
wait most of their time, so that workers and not the machine set the pace. Meanwhile the fault is
injected. When all is done, the books are compared: each sale that was committed has been shipped
once, and no other; each letter was posted at least once.
"""
