"""Makes `inputs/`: the small tokenizers that the stored outputs start from.

The bytes of a trained tokenizer depend on the versions of sentencepiece and tokenizers, so they are stored.
Running this again changes every stored output; `remake.py` and `make_checkpoint.py` come after it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / part) for part in ("", "distributed"))

from corpus import sample_texts
from support import make_llama3_tokenizer

from golden.commands import INPUTS, Command, script_environment, write_jsonl

LLAMA2_PIECES = 361  # odd, for plugins to pad
LLAMA3_PIECES = 400


def main() -> None:
    texts = sample_texts(300, seed=1, chinese=False)
    shutil.rmtree(INPUTS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_jsonl(
            directory / "english" / "records.jsonl",
            [{"source": "", "target": text, "category": "x"} for text in texts],
        )
        maker = Command(
            "examples/make_base_model.py",
            *("--data_input_dirs", "english", "--output_dir", "llama2"),
            *("--vocab_size", LLAMA2_PIECES, "--hidden_size", 16, "--num_layers", 1, "--num_heads", 2),
        )
        finished = maker.run(directory, script_environment())
        assert finished.returncode == 0, finished.stderr
        (INPUTS / "llama2").mkdir(parents=True)
        for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(directory / "llama2" / file, INPUTS / "llama2" / file)
    make_llama3_tokenizer(texts, INPUTS / "llama3", LLAMA3_PIECES)


if __name__ == "__main__":
    main()
