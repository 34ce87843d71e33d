"""What the loop of `distill/train.py` is made of."""
