"""Owns what the commands do, as plain functions; `cli/` only parses and prints."""
