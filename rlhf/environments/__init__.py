"""What the world answers: tools, environments, and conversations of exact tokens. No Ray in here."""
