"""The plan of a run: its images, cut into shards and slices, before anything is made."""
