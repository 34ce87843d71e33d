"""python benchmark.py BENCHMARK [key=value ...]; `python benchmark.py --help` tells the rest."""

import sys

from distill.benchmark.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
