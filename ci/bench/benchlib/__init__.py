"""What `make bench` and `make demo` share: runs of one model in one mode, each in a process of its own."""

import os

# Before the engine is loaded here: its threads sleep when they have nothing to do. One that spins would take a core
# from the process that is measured, which has its own setting (runs.py).
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ.pop("GOMP_SPINCOUNT", None)
