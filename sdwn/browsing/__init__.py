"""A release is searched and looked at: pages served on this machine."""
