"""`pytest -p tests.engine.plugin FILES` runs tests of any kind with Transformer Engine's layers and kernels for CPU."""

from tests.engine import choose

choose.prepare_forked()  # before tests.dist.run is imported
choose.prepare(fused_gradients=False)  # a model that a test makes by itself has no buffers; those of trainers do
