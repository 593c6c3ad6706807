"""What belongs to one process: its devices, memory, rendezvous and names."""
