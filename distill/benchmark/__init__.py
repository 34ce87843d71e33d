"""What things cost: each measured against its baseline, interleaved, in one run."""
