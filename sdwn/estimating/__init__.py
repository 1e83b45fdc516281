"""What a run will take, and on what that rests."""
