"""`pytest -p tests.engine.plugin FILES`: tests of all kinds see Transformer Engine's layers, with kernels for CPU."""

from tests.engine import choose

choose.prepare_forked()  # before tests.dist.run is imported
choose.prepare(fused_gradients=False)  # a model that a test makes by itself has no buffers; those of trainers do
