"""The published layouts of benchmarks, one module each: which files there are, and what a row of them asks. No torch.

Each module has RELEASES, the forms in which its benchmark was published, the original one first.
"""
