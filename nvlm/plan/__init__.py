"""Layouts by arithmetic: what fits, how long a step takes, and why the others do not run. No torch."""
