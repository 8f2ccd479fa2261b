import math

import torch

from colossal_llama.training.llama.embedding_noise import EmbeddingNoise
from colossal_llama.training.llama.forward import install_forwards


def noise_of(step: int, rank: int, seed: int = 1, real: int = 30) -> torch.Tensor:
    noise = EmbeddingNoise(alpha=5.0, seed=seed)
    noise.start_step(step, rank)
    is_real = torch.arange(40)[None] < real
    return noise(torch.zeros(1, 40, 16), is_real)


def test_noise_is_uniform_within_its_bound_on_real_tokens_only():
    noise = noise_of(step=3, rank=0)
    bound = 5.0 / math.sqrt(30 * 16)
    assert noise[:, :30].abs().max() <= bound
    assert noise[:, :30].abs().max() > 0.95 * bound
    assert abs(float(noise[:, :30].std()) - bound / math.sqrt(3)) < 0.1 * bound
    assert not noise[:, 30:].any()


def test_noise_depends_on_step_rank_and_seed_alone():
    assert torch.equal(noise_of(3, 0), noise_of(3, 0))
    for other in (noise_of(4, 0), noise_of(3, 1), noise_of(3, 0, seed=2)):
        assert not torch.equal(noise_of(3, 0), other)


def test_no_noise_in_evaluation(tiny_model_dir):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model_dir, torch_dtype=torch.float32)
    noise = EmbeddingNoise(5.0, seed=0)
    noise.start_step(0, 0)
    install_forwards(model, embedding_noise=noise)
    ids = torch.arange(3, 19)[None]
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "labels": ids}
    batch["position_ids"] = torch.arange(16)[None]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.eval()
        quiet = [float(model(**batch)["loss_sum"]) for _ in range(2)]
        model.train()
        noisy = [float(model(**batch)["loss_sum"]) for _ in range(2)]
    assert quiet[0] == quiet[1]
    assert len({quiet[0], *noisy}) == 3
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
