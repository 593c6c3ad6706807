"""What belongs to one process: its device, memory, process group and shared-memory names."""
