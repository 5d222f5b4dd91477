"""Saving: files that replace each other at once, models in folders, states in files. Never pickle."""
