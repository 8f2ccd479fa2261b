"""Cures for defects of the libraries that this suite builds on, one in a file each.

Every file says what is broken, in which versions, how it shows, and what is done about it. Nothing outside
this package changes a library. `tests/upstream` has a canary for each cure: a test that is expected to fail,
and turns red once the library is fixed, so that the cure can go.

Other defects are cured by how a part of the suite is made, so they have no file here
(the last column is the file of their canaries, `tests/upstream/test_….py`):

    where                            defect                                                      canary
    conversation/template.py         transformers: LLaMA-3's fast tokenizers add BOS             transformers
                                     though add_bos_token is false
    dataset/encoders/pretraining.py  tokenizers: offsets overlap at the start of a text          transformers
    dataset/workers/local.py,        tokenizers: its threads compete with our processes;         -
      dataset/workers/               transformers imports torch in each (USE_TORCH)
      ray_cluster.py
    inference/loading.py,            peft reads adapters onto a GPU of its own choice            - (a GPU)
      training/llama/adapters.py
    launch/environment.py            colossalai run joins arguments and variables unquoted       colossalai
    launch/preflight.py              torchrun returns 1 whatever the exit code of a rank is      torch
    tokenizer/                       transformers: save_pretrained writes add_prefix_space:      transformers
      sentencepiece_extension.py     null, on which slow and fast disagree
                                     sentencepiece: pieces of equal score tie, and what ties     -
                                     is split differently by slow and fast tokenizers
    training/checkpoint/             transformers: GenerationConfig.save_pretrained refuses      transformers
      generation_files.py            what from_pretrained has accepted
    training/checkpoint/             colossalai: save_model fails on padded embeddings           colossalai
      modeling_files.py              without tensor parallelism
    training/checkpoint/             colossalai: ZeRO checkpoints lose fp32 masters;             colossalai
      optimizer_files.py             save_optimizer asserts on a padded vocabulary
    training/llama/attention.py      colossalai: sequence parallelism without flash drops the    colossalai
                                     causal mask; transformers: SDPA joins packed documents      transformers
    training/llama/loading.py        transformers: pad_token_id of a configuration keeps a row   transformers
                                     of the embeddings from training (padding_idx)
    training/llama/loss.py           liger: losses are rounded to the logits' precision;         transformers
                                     transformers casts the whole logits to fp32; colossalai
                                     rounds the loss under sequence parallelism to bf16
    training/llama/adapters.py       peft: modules_to_save copies embeddings and unties them     transformers
    training/plugins/base.py         colossalai: no gradient norm without clipping; fused norms  colossalai
                                     without apex are None; HybridAdam needs nvcc (torch's
                                     AdamW is used)
    training/plugins/ddp.py          colossalai: no mixed precision, no clipping                 colossalai
    training/plugins/hybrid.py       colossalai: in a pipeline, nothing waits for reductions     - (a GPU)
                                     that overlap with the backward pass
                                     colossalai: ZeRO fails on a stage without parameters that   colossalai
                                     train (refused with a message); pipelines that cache the
                                     shapes of batches fail once they change
    training/resilience/             torchrun, killed, leaves its workers alive                  torch
      interruption.py
    utils/errors.py (run_command,    torch: destroying a gloo group whose peers have left can    - (a matter
      exit_at_once)                  hang; colossalai's plugin raises in __del__ at exit            of luck)
"""
