"""The report on several runs: tables with intervals, curves, samples. No torch."""
