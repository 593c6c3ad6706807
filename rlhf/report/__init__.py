"""What finished and unfinished runs did, read from their folders: compared in a table, or shown on a page."""
