"""Mergemill's Python client and command line."""
