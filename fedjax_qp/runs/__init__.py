"""What surrounds the rounds of a run: its folder, records and checkpoints, its loop, and what it leaves behind."""
