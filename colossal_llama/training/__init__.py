"""Training: from prepared bins and a model directory to checkpoints."""

from colossal_llama.upstream.compile_workers import start_no_compile_workers

# Before any module here imports torch.
start_no_compile_workers()
