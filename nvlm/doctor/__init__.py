"""What this machine has to train with: `python -m nvlm.doctor [--tokenizer DIR]`.

One row for each thing, with what its absence costs and the command that fixes it. Exit status 1 if training is
impossible. Needs nothing but Python: packages are looked up by their metadata, and imported only in separate processes,
since a broken one may crash or hang.
"""
