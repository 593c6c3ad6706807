"""What a run keeps: its directory, checkpoints, records, and what it does about failures."""
