"""accelerate launch distill.py recipe=NAME [stage=STAGE] [key=value ...]; `python distill.py --help` tells the rest."""

import sys

if __name__ == "__main__":  # processes that convert import this file too, and not all that the command line needs
    from distill.main import main

    sys.exit(main(sys.argv[1:]))
