"""Kill a run again and again, each time going on with --resume, until it ends by itself.

    python tests/killer.py SEED KILLS FLAG...     in the run's folder; says how many were killed

TensorFlow is imported once; each attempt is a fork of a process that has not used it yet.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import h5py  # noqa: F401
import keras  # noqa: F401
import tensorflow  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan_mnist

STATE = Path("checkpoints", "state")


def attempt(flags):
    """Start the run in a process of its own; return its number."""
    resume = ["--resume"] if any(STATE.glob("step-*.index")) else []
    child = os.fork()
    if not child:
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(gan_mnist.main(["train", *resume, *flags]))
    return child


def has_ended(child):
    """Return whether the process is over; its status can still be asked for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(child, kind, longest):
    """Wait for a random time, or until some file or other is half written, or for the end."""
    end = time.monotonic() + random.uniform(2, longest)
    seen, wanted = set(), random.randrange(1, 15)
    while not has_ended(child):
        for folder in (STATE, STATE.parent, Path("samples")):
            seen |= {path.name for path in folder.glob("*_temp")}  # TensorFlow's
            seen |= {path.name for path in folder.glob(f".*.{child}.partial*")}
        if time.monotonic() > end if kind == "training" else len(seen) >= wanted:
            return time.sleep(random.uniform(0, 0.005))


def main():
    """Do as the doc string above says."""
    random.seed(int(sys.argv[1]))
    killed = {"training": 0, "writing": 0}
    while True:
        child, kind = attempt(sys.argv[3:]), random.choice(list(killed))
        if sum(killed.values()) < int(sys.argv[2]):
            wait(child, kind, 8 + sum(killed.values()))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status != signal.SIGKILL:
            print(killed)
            return os.waitstatus_to_exitcode(status)
        killed[kind] += 1


if __name__ == "__main__":
    sys.exit(main())
