"""Checks what this machine has for training: `python -m nvlm.doctor [--tokenizer DIR]`.

Prints one row per item, with what its absence costs and the command that fixes it. Exit status 1 if training is
impossible. Needs only Python: packages are looked up by their metadata and imported only in separate processes, since
a broken one may crash or hang.
"""
