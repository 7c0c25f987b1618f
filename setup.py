"""Install: `pip install -e '.[test,demo]' -c constraints.txt`, which is what the Makefile does."""

from setuptools import find_packages, setup

setup(
    name="nvlm-trainer",
    version="0.1.0",
    description="Trainer for NVLM-D, NVLM-X and NVLM-H on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["nvlm", "nvlm.*"]),
    package_data={
        "nvlm.data": ["forms/*.yaml", "text/tiny_tokenizer/*.json"],
        "nvlm.evaluate": ["*.jinja"],
        "nvlm.explain": ["*.css", "*.jinja"],
        "nvlm.inspect": ["*.css", "*.jinja"],
        "nvlm.report": ["*.css", "*.jinja"],
        "nvlm.vision": ["*.safetensors"],
    },
    install_requires=[
        "torch>=2.11,<2.16",
        "torchvision",
        "megatron-core>=0.19,<0.20",
        "psutil",  # Megatron's checkpoints hang without it
        "av",  # decodes videos; its wheel has FFmpeg
        "datasets",
        "einops",  # Megatron's groups for two-dimensional context parallelism
        "hydra-core>=1.3",
        "Jinja2",
        "matplotlib",
        "omegaconf>=2.3",
        "pillow",
        "PyYAML",
        "rich",
        "safetensors",
        "tensorboard",
        "tokenizers",
    ],
    entry_points={"lmms_eval.models": ["nvlm = nvlm.lmms.manifest:manifest"]},
    extras_require={
        "demo": ["scikit-learn"],
        "gpu": ["transformer-engine[pytorch]", "flash-attn"],
        "lmms": ["lmms-eval==0.7.3"],  # in an environment of its own: it needs old versions of several packages
        "slurm": ["hydra-submitit-launcher"],
        "wandb": ["wandb"],
        "test": ["hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "transformers"],
    },
)
