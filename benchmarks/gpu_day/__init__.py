"""The first hour on a machine with GPUs: what runs there, how fast, and within which memory."""
