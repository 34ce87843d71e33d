"""accelerate launch distill.py recipe=NAME [stage=STAGE] [key=value ...]; `python distill.py --help` tells the rest."""

import sys

from distill.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
