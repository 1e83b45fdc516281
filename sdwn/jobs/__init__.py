"""Array tasks: what they run, how they are submitted and followed, and what they write."""
