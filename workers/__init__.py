"""The programs: command line, supervisor, workers, and what they speak."""
