"""Corpora on disk or behind URLs: finding files, reading JSONL, and what makes a record unusable."""
