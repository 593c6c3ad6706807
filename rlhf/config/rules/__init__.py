"""What pydantic cannot check: settings that contradict each other."""
