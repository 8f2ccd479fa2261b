"""Training: from prepared bins and a model directory to checkpoints."""

import os

# Loading a model reaches torch's compiler, which starts a pool of processes that nothing here uses.
# The setting is read when torch is imported, so it has to stand before that.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
