"""Package metadata; tools are configured in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "megatron_flashi2v" / "version.py"))["__version__"]

setup(
    name="megatron-flashi2v",
    version=VERSION,
    description="Large-scale training of FlashI2V image-to-video diffusion transformers on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # kernels/ has no __init__.py: a top-level package named "kernels" would shadow Hugging Face's.
    packages=[
        *find_packages(include=["megatron_flashi2v", "megatron_flashi2v.*"]),
        *find_packages(where="kernels", include=["flashi2v_kernels", "flashi2v_kernels.*"]),
    ],
    package_dir={"flashi2v_kernels": "kernels/flashi2v_kernels"},
    package_data={"megatron_flashi2v.data": ["*.jinja"]},
    install_requires=[
        "torch>=2.7",
        "megatron-core>=0.16,<0.17",
        "numpy",
        "einops",
        "safetensors",
        "pyyaml",
        "diffusers>=0.35",
        "accelerate",  # diffusers loads Wan's VAE and transformer with it
        "transformers>=4.51",
        "sentencepiece",
        "protobuf",
        "av>=17",
        "imageio",  # with the next, diffusers' export_to_video
        "imageio-ffmpeg",
        "ftfy",
        "beautifulsoup4",
        "pillow",
        "psutil",  # megatron-core's checkpointing imports it
        "packaging",
        "cachetools>=5.3",
        "jinja2",
        "tyro>=0.9",
        "rich",
        "matplotlib",
    ],
    extras_require={
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "import-linter", "mypy", "types-PyYAML",
                 "tensorboard",
                 # evaluation's measures are checked against theirs
                 "scipy", "scikit-image",
                 # adapters against theirs
                 "peft",
                 # for the kernels' tests without a GPU; CUDA builds of torch bring it, CPU builds do not
                 "triton>=3; platform_system == 'Linux'"],
        "cuda": ["transformer-engine[pytorch]", "flash-attn"],
        "npu": ["torch_npu"],
        "logging": ["tensorboard", "wandb"],
        # diffusers reads adapters with it
        "adapters": ["peft"],
    },
    entry_points={"console_scripts": ["flashi2v=megatron_flashi2v.cli.main:main"]},
)
