"""Short jobs that answer a question before a run: its pilot, a batch size, a probe."""
