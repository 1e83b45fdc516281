"""Generation: an array task that samples the images of shards and writes them."""
