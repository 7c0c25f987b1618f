"""Tests that need Transformer Engine's stand-in from the first import on.

They aren't named `test_*`, so that pytest finds them only where tests/engine/test_engine.py starts them: in a process
of their own, with `-p tests.engine.plugin`.
"""
