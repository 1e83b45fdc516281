"""Tasks under a scheduler: submitting, following, and what they said."""
