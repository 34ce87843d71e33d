"""python benchmark.py BENCHMARK [key=value ...]; `python benchmark.py --help` tells the rest."""

import sys

if __name__ == "__main__":  # processes that measure import this file too, and not all that the command line needs
    from distill.benchmark.main import main

    sys.exit(main(sys.argv[1:]))
