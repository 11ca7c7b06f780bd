"""A guarded process without JAX: `python guarded.py PORT COUNT INDEX SECONDS CODE`; CODE may be minus a signal.

Its work sleeps, tells of a saved step 7, and ends.
"""

import os
import sys
import time

from parallel.guard import Child, Guard
from parallel.launch import Launch
from parallel.links import Member, meet


def main(port: str, count: int, index: int, seconds: float, code: int) -> int:
    child = Child()
    if child.inside:
        child.saved(7)
        time.sleep(seconds)
        if code < 0:
            os.kill(os.getpid(), -code)
        return code
    links, members = meet(Launch(f"localhost:{port}", count, index), Member(index, "here", child.pid), 20)
    return Guard(index, child, links, members).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])))
