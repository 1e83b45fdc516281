"""The commands, a module for each group; each command is one short function."""
