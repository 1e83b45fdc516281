"""The commands, by what they are for; each is one short function."""
