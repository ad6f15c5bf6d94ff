"""Prunes several networks in several threads at once, and compares every result with those of one after the other, to the last bit.

    python tools/threads.py                         # 8 threads, 5 networks, 5 rounds
    python tools/threads.py --threads 16 --rounds 20

Meanwhile another thread takes values out of tensors and runs attention and other networks, whose results may not differ either.

Exit code: 0; 1 where a result differs or anything goes wrong.
"""

from __future__ import annotations

import argparse
import sys
import time

from _environment import ROOT, enter


def main() -> int:
    """Runs the comparison, and prints how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8, help="threads that prune, 8 by default")
    parser.add_argument("--rounds", type=int, default=5, help="times that each thread prunes each network, 5 by default")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch  # noqa: PLC0415 (only the environment has it)

    from tests.support.threads import NETWORKS, rounds  # noqa: PLC0415

    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)
    start = time.perf_counter()
    right, wrong = rounds(given.threads, given.rounds)
    total = given.threads * given.rounds * len(NETWORKS)
    print(f"{right} of {total} results as in turn, {time.perf_counter() - start:.1f} s")
    for line in wrong:
        print(line)
    return 0 if right == total and not wrong else 1


if __name__ == "__main__":
    enter("dev")
    sys.exit(main())
