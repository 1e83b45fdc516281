"""The commands, a module for each group: a function parses, calls the library, returns a Result."""
