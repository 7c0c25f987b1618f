"""Tests that need Transformer Engine's stand-in from the first import on.

They are not named `test_*`, so that pytest finds them only when tests/engine/test_engine.py starts them, in a separate
process with `-p tests.engine.plugin`.
"""
