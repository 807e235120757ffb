"""How long a test waits for what has to come."""

PATIENCE_S = 120.0
"""Tests run many at a time on machines that may stand still for seconds: a short limit on what is waited for fails
there, and says nothing about the code."""
