"""Faults put in on purpose, and how often the promise held: docs/reliability.md."""
